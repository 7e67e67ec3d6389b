// SPDX-License-Identifier: Apache-2.0
package io.octolora.cli;

import java.io.IOException;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import java.util.Optional;
import java.util.concurrent.TimeUnit;
import java.util.regex.Matcher;
import java.util.regex.Pattern;

/** A browser of the Chromium family, without a window. */
record Browser(Path program) {
  private static final List<String> NAMES = List.of("chromium", "chromium-browser", "google-chrome", "chrome");

  static Optional<Browser> find() {
    String path = System.getenv("PATH");
    return Arrays.stream((path == null ? "" : path).split(":"))
        .flatMap(folder -> NAMES.stream().map(name -> Path.of(folder, name)))
        .filter(Files::isExecutable).map(Browser::new).findFirst();
  }

  /**
   * Opens a page in a frame of each width and evaluates an expression there, in which {@code page} is its document and
   * {@code view} its window.
   *
   * @return the values as text, in the order of the widths
   */
  List<String> evaluate(Path folder, String html, String expression, int... widths)
      throws IOException, InterruptedException {
    String text = html.replace("\\", "\\\\").replace("`", "\\`").replace("${", "\\${").replace("</", "<\\/");
    Path outer = Files.writeString(folder.resolve("frames.html"), """
        <!DOCTYPE html><meta charset="utf-8"><body><script>
        const html = `%s`;
        for (const width of %s) {
          const frame = document.createElement('iframe');
          frame.style = `width:${width}px;height:800px;border:0`;
          frame.onload = () => {
            const view = frame.contentWindow, page = frame.contentDocument;
            const result = document.createElement('pre');
            result.textContent = `result ${width}: ${%s} end`;
            document.body.append(result);
          };
          frame.srcdoc = html;
          document.body.append(frame);
        }
        </script>
        """.formatted(text, Arrays.toString(widths), expression));
    List<String> command = new ArrayList<>(List.of(program.toString(), "--headless", "--disable-gpu", "--dump-dom",
        "--user-data-dir=" + folder.resolve("profile"), "--virtual-time-budget=5000", "--no-first-run"));
    if ("root".equals(System.getProperty("user.name"))) {
      command.add("--no-sandbox"); // Chromium's sandbox refuses root
    }
    command.add(outer.toUri().toString());
    Path output = folder.resolve("dom");
    Path errors = folder.resolve("browser.log");
    Process process = new ProcessBuilder(command).redirectOutput(output.toFile()).redirectError(errors.toFile())
        .start();
    if (!process.waitFor(90, TimeUnit.SECONDS)) {
      process.destroyForcibly();
      throw new AssertionError(command + " still runs after 90 s: " + Files.readString(errors));
    }
    String dom = Files.readString(output, StandardCharsets.UTF_8);
    List<String> results = new ArrayList<>();
    for (int width : widths) {
      Matcher matcher = Pattern.compile("<pre>result " + width + ": (.*?) end</pre>", Pattern.DOTALL).matcher(dom);
      if (!matcher.find()) {
        throw new AssertionError("no result of width %d: %s%n%s".formatted(width, dom, Files.readString(errors)));
      }
      results.add(matcher.group(1));
    }
    return results;
  }
}

// SPDX-License-Identifier: Apache-2.0
package io.octolora.cli;

import io.octolora.OctoloraException;
import java.io.IOException;
import java.io.UncheckedIOException;
import java.nio.file.AccessDeniedException;
import java.nio.file.FileAlreadyExistsException;
import java.nio.file.InvalidPathException;
import java.nio.file.NoSuchFileException;
import java.nio.file.Path;
import java.util.Locale;
import java.util.concurrent.Callable;
import picocli.CommandLine;
import picocli.CommandLine.Command;
import picocli.CommandLine.Help.Ansi;
import picocli.CommandLine.Model.CommandSpec;
import picocli.CommandLine.Option;
import picocli.CommandLine.ParameterException;
import picocli.CommandLine.ScopeType;
import picocli.CommandLine.Spec;
import picocli.CommandLine.TypeConversionException;

/**
 * The command line. Exit status: 0 everything is within bounds and mapped; 1 something is not; 2 bad usage or input,
 * with one line on standard error.
 */
@Command(name = "octolora", scope = ScopeType.INHERIT, mixinStandardHelpOptions = true,
    versionProvider = Main.Version.class, usageHelpWidth = 100,
    subcommands = {InspectCommand.class, QuantizeCommand.class, VerifyCommand.class},
    description = "Int8 linear layers with live LoRA adapters.",
    footer = {"", "Exit status: 0 all within bounds and mapped, 1 something is not, 2 bad usage or input."})
public final class Main implements Callable<Integer> {
  static final int OK = 0;
  static final int FAILED = 1;
  static final int BAD_INPUT = 2;

  @Spec
  private CommandSpec spec;

  @Option(names = "--stacktrace", scope = ScopeType.INHERIT, description = "Show where an error comes from.")
  private boolean stacktrace;

  final Terminal terminal;

  Main(Terminal terminal) {
    this.terminal = terminal;
  }

  public static void main(String[] args) {
    // Numbers that --threshold takes look like those that are printed.
    Locale.setDefault(Locale.Category.FORMAT, Locale.ROOT);
    StandardOutput out = new StandardOutput();
    int status = run(Terminal.ofProcess(out), args);
    if (out.failure() != null) {
      System.err.println("octolora: standard output: " + out.failure().getMessage());
      status = BAD_INPUT;
    }
    System.exit(status);
  }

  /** The whole program but for the end of the process; returns the exit status. */
  static int run(Terminal terminal, String... args) {
    Main main = new Main(terminal);
    CommandLine line = new CommandLine(main);
    line.setOut(terminal.out());
    line.setErr(terminal.err());
    line.setColorScheme(CommandLine.Help.defaultColorScheme(terminal.colours() ? Ansi.ON : Ansi.OFF));
    line.setParameterExceptionHandler((e, arguments) -> main.fail(e, e.getMessage()
        + " (octolora %s--help shows the usage)".formatted(
            e.getCommandLine() == line ? "" : e.getCommandLine().getCommandName() + " ")));
    line.registerConverter(Path.class, Main::path);
    line.setExecutionExceptionHandler((e, command, parsed) -> main.fail(e, explain(e)));
    try {
      return line.execute(args);
    } catch (OutOfMemoryError e) {
      return main.fail(e, "out of memory: " + e.getMessage() + "; java -Xmx sets how much there is");
    } finally {
      terminal.out().flush();
      terminal.err().flush();
    }
  }

  @Override
  public Integer call() {
    throw new ParameterException(spec.commandLine(), "a command is needed: inspect, quantize or verify");
  }

  /** The empty path would be the working folder, and is what an unset variable of a shell leaves. */
  private static Path path(String text) {
    if (text.isEmpty()) {
      throw new TypeConversionException("the path is empty");
    }
    try {
      return Path.of(text);
    } catch (InvalidPathException e) {
      throw new TypeConversionException("%s (under a locale of UTF-8, such as LC_ALL=C.UTF-8, any name can be read)"
          .formatted(e.getMessage()));
    }
  }

  private int fail(Throwable e, String message) {
    terminal.out().flush();
    terminal.clearProgress();
    terminal.err().println(terminal.paint(Terminal.Tone.BAD, "octolora: ") + Table.printable(message));
    if (stacktrace) {
      e.printStackTrace(terminal.err());
    }
    return BAD_INPUT;
  }

  private static String explain(Exception e) {
    if (e instanceof UncheckedIOException wrapped) {
      String cause = explain(wrapped.getCause());
      boolean own = !wrapped.getCause().toString().equals(wrapped.getMessage());
      return own ? wrapped.getMessage() + ": " + cause : cause;
    }
    if (e instanceof NoSuchFileException missing) {
      return missing.getFile() + ": no such file or folder";
    }
    if (e instanceof FileAlreadyExistsException existing) {
      return existing.getFile() + ": exists and is no folder";
    }
    if (e instanceof AccessDeniedException denied) {
      return denied.getFile() + ": permission denied";
    }
    if (e instanceof OctoloraException || e instanceof IOException) {
      return e.getMessage() == null ? e.getClass().getSimpleName() : e.getMessage();
    }
    return "%s: %s (a defect; --stacktrace shows where)".formatted(e.getClass().getName(), e.getMessage());
  }

  /** The jar's version; a class folder has none. */
  static final class Version implements CommandLine.IVersionProvider {
    @Override
    public String[] getVersion() {
      String version = Main.class.getPackage().getImplementationVersion();
      return new String[] {"octolora " + (version == null ? "(not from a jar)" : version)};
    }
  }
}

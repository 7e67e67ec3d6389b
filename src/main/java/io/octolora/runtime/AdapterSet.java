// SPDX-License-Identifier: Apache-2.0
package io.octolora.runtime;

import io.octolora.OctoloraException;
import io.octolora.Status;
import io.octolora.internal.Names;
import io.octolora.mapping.ModuleMap;
import java.util.ArrayList;
import java.util.Collection;
import java.util.Collections;
import java.util.HashMap;
import java.util.LinkedHashMap;
import java.util.LinkedHashSet;
import java.util.List;
import java.util.Map;
import java.util.Objects;
import java.util.Set;
import java.util.TreeMap;
import org.jetbrains.annotations.Nullable;

/**
 * Named adapters over a group of loaded layers, and which of them are active with what weights, as
 * {@code set_adapters(names, weights)} of diffusers and PEFT has it: {@code y = base(x) + bias + Σ weightᵢ · scaleᵢ ·
 * ((x·Aᵢᵀ)·Bᵢᵀ + biasᵢ)}, where a choice replaces the one before it and the order of its names changes no bit.
 *
 * <p>{@link #layer} is a layer under the active choice, whatever that is at each call. {@link #select} gives a request
 * a choice of its own that no one changes. What is attached to the layers themselves is apart from both.
 *
 * <p>Added adapters are in host memory, once, and their files may be closed. On the device each distinct choice in use
 * has the factors of its adapters; equal choices share them, so that asking again for one in use costs nothing. A new
 * one is filled before the old one is given up, and nothing changes where it does not fit.
 *
 * <p>The caller closes the set, its selections and the layers, in any order. All methods may be called from any thread
 * and while other threads run forwards on their own streams: a forward uses one choice, the old or the new one, never
 * parts of both. Forwards wait for no one; the changing methods wait for each other. They throw
 * {@link IllegalStateException} after {@link #close()} of the set or of a layer that is to be filled, and
 * {@link OctoloraException} with {@link Status#INVALID_ARGUMENT} naming the adapter or the layer. The device's part is
 * {@code octolora_slots} in {@code octolora/octolora.h}.
 */
public final class AdapterSet implements AutoCloseable {
  private static final int NEAREST = 3;

  /** Compared by identity: a removed name may come back as another adapter. */
  private static final class Adapter {
    final String name;
    final Map<String, HostAdapter> layers;

    Adapter(String name, Map<String, HostAdapter> layers) {
      this.name = name;
      this.layers = layers;
    }
  }

  /** Filled slots by layer, shared by the selections of these weights. */
  private static final class Filled {
    final Map<Adapter, Float> weights;
    final Map<String, AdapterSlots> slots = new HashMap<>();
    /** Guarded by the set. */
    int selections;

    Filled(Map<Adapter, Float> weights) {
      this.weights = weights;
    }

    void close() {
      slots.values().forEach(AdapterSlots::close);
    }
  }

  private final Map<String, Int8Linear> layers;
  private final LoraPrecision precision;
  /** Guarded by this, in the order of adding. */
  private final Map<String, Adapter> adapters = new LinkedHashMap<>();
  /** Guarded by this; what at least one selection uses. */
  private final Map<Map<Adapter, Float>, Filled> filled = new HashMap<>();
  /** Written under this. A new one is in place before the old one is closed. */
  private volatile Selection active;
  private volatile boolean closed;

  /** {@link #AdapterSet(Collection, LoraPrecision)} with {@link LoraPrecision#BITS_16}. */
  public AdapterSet(Collection<Int8Linear> layers) {
    this(layers, LoraPrecision.BITS_16);
  }

  /**
   * No adapters yet.
   *
   * @param layers of distinct names; they may be on several devices
   * @param precision of all adapters
   */
  public AdapterSet(Collection<Int8Linear> layers, LoraPrecision precision) {
    Map<String, Int8Linear> byName = new TreeMap<>(Names.NATURAL);
    for (Int8Linear layer : layers) {
      if (byName.put(layer.name(), layer) != null) {
        throw invalid("two layers have the name " + layer.name());
      }
    }
    this.layers = Collections.unmodifiableMap(byName);
    this.precision = Objects.requireNonNull(precision, "precision");
    this.active = select(Map.of());
  }

  // ---- Adapters

  /**
   * Adds an adapter, which is not active yet, and copies its factors.
   *
   * @param name new in this set
   * @param map each of its modules is a layer of this set, of the same shape
   * @throws IllegalArgumentException if a factor does not fit its layer, naming both shapes
   */
  public void add(String name, ModuleMap map) {
    List<String> absent = map.modules().stream().filter(module -> !layers.containsKey(module)).toList();
    if (!absent.isEmpty()) {
      throw invalid("adapter %s changes %d layers that are not in this set of %d: %s%s".formatted(name, absent.size(),
          layers.size(), String.join(", ", absent.subList(0, Math.min(NEAREST, absent.size()))),
          absent.size() > NEAREST ? ", …" : ""));
    }
    Map<String, HostAdapter> copies = new HashMap<>();
    for (String module : map.modules()) {
      Int8Linear layer = layers.get(module);
      copies.put(module, HostAdapter.of(map.delta(module), layer.name, layer.n, layer.k));
    }
    add(name, copies);
  }

  /** For factors that come from no file. */
  synchronized void add(String name, Map<String, HostAdapter> byLayer) {
    requireOpen();
    if (adapters.putIfAbsent(Objects.requireNonNull(name, "name"), new Adapter(name, byLayer)) != null) {
      throw invalid("adapter %s is in this set already".formatted(name));
    }
  }

  /** Takes an adapter away, also from the active ones. Selections that have it keep it until they are closed. */
  public synchronized void remove(String name) {
    requireOpen();
    requireAdapter(name);
    Map<String, Float> rest = new LinkedHashMap<>(active());
    if (rest.remove(name) != null) {
      setAdapters(rest);
    }
    adapters.remove(name);
  }

  /** The adapters that there are, in the order of adding. */
  public synchronized Set<String> names() {
    return Collections.unmodifiableSet(new LinkedHashSet<>(adapters.keySet()));
  }

  // ---- The active ones

  /**
   * Makes these adapters the active ones and no others. Returns when forwards that begin from now on use them.
   *
   * @param weights by name, any finite numbers; each multiplies the adapter's own scale. 0 costs nothing in a forward
   * @throws OctoloraException also {@link Status#OUT_OF_MEMORY}, with the former ones still active
   */
  public synchronized void setAdapters(Map<String, Float> weights) {
    Selection former = active;
    active = select(weights);
    former.close();
  }

  /** {@link #setAdapters(Map)} with weights of 1. */
  public void setAdapters(String... names) {
    Map<String, Float> weights = new LinkedHashMap<>();
    for (String name : names) {
      weights.put(name, 1f);
    }
    setAdapters(weights);
  }

  /** The active adapters and their weights; unmodifiable. */
  public Map<String, Float> active() {
    return active.weights();
  }

  /**
   * A layer under what is active when each call begins. A view: it is good for as long as this set, and closing it does
   * nothing. A change can raise {@link Forward#workspaceBytes}; a {@link Selection}'s stays.
   */
  public Forward layer(String name) {
    return new AdaptedLayer(requireLayer(name), () -> acquireActive(name));
  }

  private @Nullable NativeHandle acquireActive(String layer) {
    while (true) {
      requireOpen();
      AdapterSlots slots = active.filled.slots.get(layer);
      if (slots == null) {
        return null;
      }
      if (slots.handle.tryAcquire()) {
        return slots.handle;
      } // else another choice has become active meanwhile
    }
  }

  // ---- One request's own

  /** What is active now, which stays the same for whoever holds it. */
  public synchronized Selection select() {
    return select(active());
  }

  /**
   * A choice of adapters beside the active one; see {@link #setAdapters(Map)}. The caller closes it.
   *
   * @throws OctoloraException also {@link Status#OUT_OF_MEMORY}, with nothing kept
   */
  public synchronized Selection select(Map<String, Float> weights) {
    requireOpen();
    weights.forEach((name, weight) -> {
      requireAdapter(name);
      if (!Float.isFinite(weight)) {
        throw invalid("adapter %s: weight = %s, expected a finite number".formatted(name, weight));
      }
    });
    Map<Adapter, Float> used = new LinkedHashMap<>(); // in one order for all, and so with the same rounding
    for (Adapter adapter : adapters.values()) {
      float weight = weights.getOrDefault(adapter.name, 0f);
      if (weight != 0) {
        used.put(adapter, weight);
      }
    }
    Filled slots = filled.get(used);
    if (slots == null) {
      slots = fill(used);
      filled.put(used, slots);
    }
    slots.selections++;
    return new Selection(this, weights, slots);
  }

  private Filled fill(Map<Adapter, Float> weights) {
    Filled fresh = new Filled(weights);
    Set<NativeHandle> devices = new LinkedHashSet<>();
    boolean complete = false;
    try {
      for (Int8Linear layer : layers.values()) {
        List<Adapter> here = new ArrayList<>(weights.keySet());
        here.removeIf(adapter -> !adapter.layers.containsKey(layer.name));
        if (here.isEmpty()) {
          continue;
        }
        AdapterSlots slots = layer.slots(precision,
            here.stream().anyMatch(adapter -> adapter.layers.get(layer.name).magnitude() != null),
            here.stream().mapToInt(adapter -> adapter.layers.get(layer.name).rank()).toArray());
        fresh.slots.put(layer.name, slots);
        for (int i = 0; i < here.size(); i++) {
          slots.set(i, here.get(i).layers.get(layer.name), weights.get(here.get(i)), 0);
        }
        devices.add(layer.device);
      }
      for (NativeHandle device : devices) {
        // A caller's stream need not be ordered behind the default one, on which the slots were filled.
        NativeLibrary.check(NativeOctolora.streamSynchronize(device.address(), 0));
      }
      complete = true;
      return fresh;
    } finally {
      if (!complete) {
        fresh.close();
      }
    }
  }

  private void release(Filled slots) {
    synchronized (this) {
      if (--slots.selections > 0) {
        return;
      }
      filled.remove(slots.weights);
    }
    slots.close();
  }

  /**
   * An immutable choice of adapters, for as long as a request or any other holder wants it, whatever becomes active
   * meanwhile, and also after its set is closed.
   *
   * <p>The holder closes it; calls in progress end with it first, and a captured CUDA graph must not outlive it. Calls
   * throw {@link IllegalStateException} after that. It may be used by several threads. Made by
   * {@link AdapterSet#select}.
   */
  public static final class Selection implements AutoCloseable {
    private final Map<String, Int8Linear> layers;
    private final Map<String, Float> weights;
    private final Filled filled;
    /** Of no native object of its own: says once that the shared slots have one user less. */
    private final NativeHandle handle;

    private Selection(AdapterSet set, Map<String, Float> weights, Filled filled) {
      this.layers = set.layers;
      this.weights = Collections.unmodifiableMap(new LinkedHashMap<>(weights));
      this.filled = filled;
      this.handle = new NativeHandle("Selection " + this.weights, 0, none -> set.release(filled));
    }

    /** The adapters and their weights; unmodifiable. */
    public Map<String, Float> weights() {
      return weights;
    }

    /** A layer under this selection. A view: it is good for as long as this, and closing it does nothing. */
    public Forward layer(String name) {
      return new AdaptedLayer(require(layers, name, "layer"), () -> acquire(name));
    }

    private @Nullable NativeHandle acquire(String layer) {
      AdapterSlots slots = filled.slots.get(layer);
      if (handle.isClosed() || slots != null && !slots.handle.tryAcquire()) {
        throw handle.closed();
      }
      return slots == null ? null : slots.handle;
    }

    /** A second time does nothing; device memory goes with the last of equal selections and calls in progress. */
    @Override
    public void close() {
      handle.close();
    }

    @Override
    public String toString() {
      return handle.toString();
    }
  }

  // ---- Refusals

  private void requireOpen() {
    if (closed) {
      throw new IllegalStateException(this + " is closed");
    }
  }

  private Int8Linear requireLayer(String name) {
    return require(layers, name, "layer");
  }

  private void requireAdapter(String name) {
    require(adapters, name, "adapter");
  }

  private static <T> T require(Map<String, T> all, String name, String what) {
    T found = all.get(Objects.requireNonNull(name, what));
    if (found == null) {
      throw invalid(all.isEmpty() ? "no %s %s: there is none yet".formatted(what, name)
          : "no %s %s; nearest: %s".formatted(what, name,
              String.join(", ", Names.nearest(name, all.keySet(), NEAREST))));
    }
    return found;
  }

  private static OctoloraException invalid(String message) {
    return new OctoloraException(Status.INVALID_ARGUMENT, message);
  }

  /** Gives up the active adapters. Selections and layers work on until they are closed; a second time does nothing. */
  @Override
  public synchronized void close() {
    closed = true;
    active.close();
  }

  @Override
  public String toString() {
    return "AdapterSet of %d layers".formatted(layers.size());
  }
}

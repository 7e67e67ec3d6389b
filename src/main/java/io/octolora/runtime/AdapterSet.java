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
import java.util.concurrent.locks.ReentrantLock;
import org.jetbrains.annotations.Nullable;

/**
 * Named adapters over a group of loaded layers, and which of them are active with what weights, as
 * {@code set_adapters(names, weights)} of diffusers and PEFT has it: {@code y = base(x) + bias + Σ weightᵢ · scaleᵢ ·
 * ((x·Aᵢᵀ)·Bᵢᵀ + biasᵢ)}, where a choice replaces the one before it and the order of its names changes no bit. Adapters
 * with magnitudes (DoRA) apply as PEFT's do, in the order of adding.
 *
 * <p>{@link #layer} is a layer under the active choice, whatever that is at each call. {@link #select} gives a request
 * a choice of its own that no one changes, {@link #selectForRows} one from which each row of a batch takes its adapter.
 * What is attached to the layers themselves is apart from all of them.
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

  /** Adapters with their weights, and whether slot i is the i-th of them on every layer. */
  private record Choice(Map<Adapter, Float> weights, boolean forRows) {}

  /** Filled slots by layer, shared by the selections of this choice. */
  private static final class Filled {
    final Choice choice;
    final Map<String, AdapterSlots> slots = new HashMap<>();
    /** Guarded by the changes of the set. */
    int selections;

    Filled(Choice choice) {
      this.choice = choice;
    }

    void close() {
      slots.values().forEach(AdapterSlots::close);
    }
  }

  private final Map<String, Int8Linear> layers;
  private final LoraPrecision precision;
  /**
   * Held by what changes the set, in the order of asking: who swaps in a loop does not keep the others waiting.
   */
  private final ReentrantLock changes = new ReentrantLock(true);
  /** Guarded by changes, in the order of adding. */
  private final Map<String, Adapter> adapters = new LinkedHashMap<>();
  /** Guarded by changes; what at least one selection uses. */
  private final Map<Choice, Filled> filled = new HashMap<>();
  /** Written under changes. A new one is in place before the old one is closed. */
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
  void add(String name, Map<String, HostAdapter> byLayer) {
    changes.lock();
    try {
      requireOpen();
      if (adapters.putIfAbsent(Objects.requireNonNull(name, "name"), new Adapter(name, byLayer)) != null) {
        throw invalid("adapter %s is in this set already".formatted(name));
      }
    } finally {
      changes.unlock();
    }
  }

  /** Takes an adapter away, also from the active ones. Selections that have it keep it until they are closed. */
  public void remove(String name) {
    changes.lock();
    try {
      requireOpen();
      requireAdapter(name);
      Map<String, Float> rest = new LinkedHashMap<>(active());
      if (rest.remove(name) != null) {
        setAdapters(rest);
      }
      adapters.remove(name);
    } finally {
      changes.unlock();
    }
  }

  /** The adapters that there are, in the order of adding. */
  public Set<String> names() {
    changes.lock();
    try {
      return Collections.unmodifiableSet(new LinkedHashSet<>(adapters.keySet()));
    } finally {
      changes.unlock();
    }
  }

  // ---- The active ones

  /**
   * Makes these adapters the active ones and no others. Returns when forwards that begin from now on use them.
   *
   * @param weights by name, any finite numbers; each multiplies the adapter's own scale. 0 costs nothing in a forward
   * @throws OctoloraException also {@link Status#OUT_OF_MEMORY}, with the former ones still active
   */
  public void setAdapters(Map<String, Float> weights) {
    changes.lock();
    try {
      Selection former = active;
      active = select(weights);
      former.close();
    } finally {
      changes.unlock();
    }
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
  public Selection select() {
    changes.lock();
    try {
      return select(active());
    } finally {
      changes.unlock();
    }
  }

  /**
   * A choice of adapters beside the active one; see {@link #setAdapters(Map)}. The caller closes it.
   *
   * @throws OctoloraException also {@link Status#OUT_OF_MEMORY}, with nothing kept
   */
  public Selection select(Map<String, Float> weights) {
    return select(weights, false);
  }

  /**
   * A choice from which each row takes one adapter, or none: {@link Selection#slot} is its number for
   * {@link ForwardCall#rowSlots}, on all layers. Where a call has no such numbers, every row uses all of them.
   *
   * @throws OctoloraException also {@link Status#UNSUPPORTED} for an adapter with magnitudes, which changes the base of
   *     all rows, and {@link Status#OUT_OF_MEMORY}, with nothing kept
   */
  public Selection selectForRows(Map<String, Float> weights) {
    return select(weights, true);
  }

  private Selection select(Map<String, Float> weights, boolean forRows) {
    changes.lock();
    try {
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
      Choice choice = new Choice(used, forRows);
      Filled slots = filled.get(choice);
      if (slots == null) {
        slots = fill(choice);
        filled.put(choice, slots);
      }
      slots.selections++;
      return new Selection(this, weights, slots);
    } finally {
      changes.unlock();
    }
  }

  private Filled fill(Choice choice) {
    List<Adapter> all = new ArrayList<>(choice.weights.keySet());
    Filled fresh = new Filled(choice);
    Set<NativeHandle> devices = new LinkedHashSet<>();
    boolean complete = false;
    try {
      for (Int8Linear layer : layers.values()) {
        List<Adapter> here = new ArrayList<>(all);
        if (choice.forRows) { // the last that is here may go, those between keep their places
          while (!here.isEmpty() && !here.get(here.size() - 1).layers.containsKey(layer.name)) {
            here.remove(here.size() - 1);
          }
        } else {
          here.removeIf(adapter -> !adapter.layers.containsKey(layer.name));
        }
        if (here.isEmpty()) {
          continue;
        }
        boolean magnitudes = false;
        int[] capacity = new int[here.size()];
        for (int i = 0; i < capacity.length; i++) {
          HostAdapter factors = here.get(i).layers.get(layer.name);
          capacity[i] = factors == null ? 1 : factors.rank();
          if (factors != null && factors.magnitude() != null) {
            magnitudes = true;
            if (choice.forRows) {
              throw new OctoloraException(Status.UNSUPPORTED, ("adapter %s has magnitudes (DoRA) on %s: they change "
                  + "the base of all rows, so no row can take it alone").formatted(here.get(i).name, layer.name));
            }
          }
        }
        AdapterSlots slots = layer.slots(precision, magnitudes, capacity);
        fresh.slots.put(layer.name, slots);
        for (int i = 0; i < capacity.length; i++) {
          HostAdapter factors = here.get(i).layers.get(layer.name);
          if (factors != null) {
            slots.set(i, factors, choice.weights.get(here.get(i)), 0);
          }
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
    changes.lock();
    try {
      if (--slots.selections > 0) {
        return;
      }
      filled.remove(slots.choice);
    } finally {
      changes.unlock();
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

    /**
     * What stands for an adapter in {@link ForwardCall#rowSlots}; -1 for one of weight 0.
     *
     * @throws OctoloraException if the selection has no such adapter, or was not made by {@link #selectForRows}
     */
    public int slot(String name) {
      require(weights, name, "adapter");
      if (!filled.choice.forRows) {
        throw invalid(this + " is for whole calls: selectForRows makes one whose rows choose");
      }
      int slot = 0;
      for (Adapter adapter : filled.choice.weights.keySet()) {
        if (adapter.name.equals(name)) {
          return slot;
        }
        slot++;
      }
      return -1;
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
  public void close() {
    changes.lock();
    try {
      closed = true;
      active.close();
    } finally {
      changes.unlock();
    }
  }

  @Override
  public String toString() {
    return "AdapterSet of %d layers".formatted(layers.size());
  }
}

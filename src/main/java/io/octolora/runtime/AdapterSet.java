// SPDX-License-Identifier: Apache-2.0
package io.octolora.runtime;

import io.octolora.OctoloraException;
import io.octolora.Status;
import io.octolora.adapter.LoraPair;
import io.octolora.internal.Names;
import io.octolora.mapping.ModuleMap;
import java.nio.ByteBuffer;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.Collection;
import java.util.Collections;
import java.util.HashMap;
import java.util.LinkedHashMap;
import java.util.LinkedHashSet;
import java.util.List;
import java.util.Map;
import java.util.Objects;
import java.util.Queue;
import java.util.Set;
import java.util.TreeMap;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.ConcurrentLinkedQueue;
import java.util.concurrent.atomic.AtomicLong;
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
 * <p>Added adapters are in host memory, once, and their files may be closed: in pinned memory, which the device reads
 * at the speed of its bus, as long as all of them fit the bytes that the set may pin, else in pageable memory. On the
 * device each distinct choice in use has the factors of its adapters; equal choices share them, so that asking again
 * for one in use costs nothing. A new one is filled before the old one is given up, and nothing changes where it does
 * not fit. The memory of the former active choice is kept for the next one of the same ranks, so that swapping to and
 * fro allocates nothing, until nothing is active. A set made with a {@link Capacity} has memory for every choice within
 * it from the beginning, whatever the ranks.
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
  /** Storage of a layer by the capacity: of the active choice, and of the next. */
  private static final int RESERVED = 2;

  /**
   * What a set holds ready on each of its layers, twice: for the active choice and for the next one, so that
   * {@link #setAdapters} between choices within it allocates nothing, be their ranks and layers the same or not.
   *
   * <p>Within it are choices of adapters without magnitudes (DoRA); others get memory of their own. All choices within
   * it, selections too, have slots of this size and so the same {@link Forward#workspaceBytes} on the layers that they
   * change. That, and some of the time of a forward, follow the capacity and not the ranks in use: ask for no more than
   * comes.
   *
   * @param adapters on one layer at once, 1 or more
   * @param rank the greatest of an adapter, 1 to {@link LoraPair#MAX_RANK}
   */
  public record Capacity(int adapters, int rank) {
    /** Refuses numbers out of range with an {@link IllegalArgumentException}. */
    public Capacity {
      if (adapters < 1) {
        throw new IllegalArgumentException("%d adapters, expected 1 or more".formatted(adapters));
      }
      if (rank < 1 || rank > LoraPair.MAX_RANK) {
        throw new IllegalArgumentException("rank = %d, expected 1 to %d".formatted(rank, LoraPair.MAX_RANK));
      }
    }

    private boolean holds(int[] ranks) {
      return ranks.length <= adapters && Arrays.stream(ranks).allMatch(one -> one <= rank);
    }

    private int[] ranks() {
      int[] ranks = new int[adapters];
      Arrays.fill(ranks, rank);
      return ranks;
    }
  }

  /** Compared by identity: a removed name may come back as another adapter. */
  private static final class Adapter {
    final String name;
    final Map<String, HostAdapter> layers;
    /** What the factors lie in; null for memory of the garbage collector's. */
    final @Nullable PinnedMemory memory;
    final long pinnedBytes;

    Adapter(String name, Map<String, HostAdapter> layers, @Nullable PinnedMemory memory, long pinnedBytes) {
      this.name = name;
      this.layers = layers;
      this.memory = memory;
      this.pinnedBytes = pinnedBytes;
    }
  }

  /** Adapters with their weights, and whether slot i is the i-th of them on every layer. */
  private record Choice(Map<Adapter, Float> weights, boolean forRows) {}

  /** Native slots of a layer, for one choice after the other. */
  private static final class Storage {
    final Int8Linear layer;
    final boolean magnitudes;
    final int[] capacity;
    /** Whether it is the set's for good, by its {@link Capacity}. */
    final boolean reserved;
    final NativeHandle handle;
    /** No enqueued work reads it. Guarded by the changes of the set once it is spare. */
    boolean idle = true;
    /** Slots from this number on are empty. Guarded like idle. */
    int used;

    Storage(Int8Linear layer, LoraPrecision precision, boolean magnitudes, int[] capacity, boolean reserved) {
      this.layer = layer;
      this.magnitudes = magnitudes;
      this.capacity = capacity;
      this.reserved = reserved;
      this.handle = layer.createSlots(precision, magnitudes, capacity);
    }
  }

  /** Filled slots by layer, shared by the selections of this choice. */
  private static final class Filled {
    final Choice choice;
    final Map<String, AdapterSlots> slots = new HashMap<>();
    /** Guarded by the changes of the set. */
    int selections;
    /** Whether the storage becomes spare when the last call that uses it is out; written before it is closed. */
    volatile boolean reusable;

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
  /** By layer, of the former active choice. */
  private final Map<String, Storage> spares = new ConcurrentHashMap<>();
  private final @Nullable Capacity capacity;
  /** By layer, what is there by the capacity and in no choice; empty without one. */
  private final Map<String, Queue<Storage>> reserve = new HashMap<>();
  /** By device, what slots are filled on, so that nobody's work on the default stream waits. */
  private final Map<NativeHandle, Stream> streams = new HashMap<>();
  private final long mostPinnedBytes;
  private final AtomicLong pinnedBytes = new AtomicLong();
  /** Written under changes. A new one is in place before the old one is closed. */
  private volatile Selection active;
  private volatile boolean closed;

  /** {@link #AdapterSet(Collection, LoraPrecision)} with {@link LoraPrecision#BITS_16}. */
  public AdapterSet(Collection<Int8Linear> layers) {
    this(layers, LoraPrecision.BITS_16);
  }

  /** {@link #AdapterSet(Collection, LoraPrecision, long)} with 1 GiB to pin. */
  public AdapterSet(Collection<Int8Linear> layers, LoraPrecision precision) {
    this(layers, precision, 1L << 30);
  }

  /**
   * No adapters yet.
   *
   * @param layers of distinct names; they may be on several devices
   * @param precision of all adapters
   * @param mostPinnedBytes of host memory that this may pin
   */
  public AdapterSet(Collection<Int8Linear> layers, LoraPrecision precision, long mostPinnedBytes) {
    this(layers, precision, mostPinnedBytes, null);
  }

  /**
   * {@link #AdapterSet(Collection, LoraPrecision, long)} with memory for choices to come.
   *
   * @param capacity null for none
   * @throws OctoloraException {@link Status#OUT_OF_MEMORY} also where the capacity does not fit a device
   */
  public AdapterSet(Collection<Int8Linear> layers, LoraPrecision precision, long mostPinnedBytes,
      @Nullable Capacity capacity) {
    Map<String, Int8Linear> byName = new TreeMap<>(Names.NATURAL);
    for (Int8Linear layer : layers) {
      if (byName.put(layer.name(), layer) != null) {
        throw invalid("two layers have the name " + layer.name());
      }
    }
    this.layers = Collections.unmodifiableMap(byName);
    this.precision = Objects.requireNonNull(precision, "precision");
    this.mostPinnedBytes = mostPinnedBytes;
    this.capacity = capacity;
    boolean complete = false;
    try {
      for (Int8Linear layer : byName.values()) {
        streams.computeIfAbsent(layer.device, device -> new Stream(device, "Stream of " + this));
      }
      if (capacity != null) {
        for (Int8Linear layer : byName.values()) {
          Queue<Storage> both = new ConcurrentLinkedQueue<>();
          reserve.put(layer.name, both);
          for (int i = 0; i < RESERVED; i++) {
            both.add(new Storage(layer, this.precision, false, capacity.ranks(), true));
          }
        }
      }
      this.active = select(Map.of());
      complete = true;
    } finally {
      if (!complete) {
        closeReserve();
        streams.values().forEach(Stream::close);
      }
    }
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
      throw invalid(HostAdapter.absent(name, absent, layers.size()));
    }
    for (String module : map.modules()) {
      Int8Linear layer = layers.get(module);
      HostAdapter.requireFit(map.delta(module), layer.name, layer.n, layer.k);
    }
    add(copy(name, map));
  }

  private Adapter copy(String name, ModuleMap map) {
    long bytes = HostAdapter.bytes(map);
    NativeHandle device = streams.keySet().stream().filter(one -> !one.isClosed()).findFirst().orElse(null);
    if (device == null || !reserve(bytes)) {
      return pageable(name, map);
    }
    PinnedMemory memory = new PinnedMemory(device, "adapter " + name, bytes);
    Adapter pinned = new Adapter(name, new HashMap<>(), memory, bytes);
    boolean complete = false;
    try {
      pinned.layers.putAll(HostAdapter.all(map, memory::take));
      complete = true;
      return pinned;
    } catch (OctoloraException refused) {
      if (refused.status() != Status.OUT_OF_MEMORY) {
        throw refused;
      }
      return pageable(name, map); // the system limits what may be pinned
    } finally {
      if (!complete) {
        free(pinned);
      }
    }
  }

  private boolean reserve(long bytes) {
    if (pinnedBytes.addAndGet(bytes) <= mostPinnedBytes) {
      return true;
    }
    pinnedBytes.addAndGet(-bytes);
    return false;
  }

  private static Adapter pageable(String name, ModuleMap map) {
    return new Adapter(name, HostAdapter.all(map, ByteBuffer::allocateDirect), null, 0);
  }

  /** For factors that come from no file. */
  void add(String name, Map<String, HostAdapter> byLayer) {
    add(new Adapter(name, byLayer, null, 0));
  }

  private void add(Adapter adapter) {
    boolean added = false;
    changes.lock();
    try {
      requireOpen();
      if (adapters.putIfAbsent(Objects.requireNonNull(adapter.name, "name"), adapter) != null) {
        throw invalid("adapter %s is in this set already".formatted(adapter.name));
      }
      added = true;
    } finally {
      changes.unlock();
      if (!added) {
        free(adapter);
      }
    }
  }

  /** Once no slots are filled from it any more: what is filled has its own copy on the device. */
  private void free(Adapter adapter) {
    if (adapter.memory != null) {
      adapter.memory.close();
      pinnedBytes.addAndGet(-adapter.pinnedBytes);
    }
  }

  /** Bytes of host memory that are pinned for the adapters now. */
  public long pinnedBytes() {
    return pinnedBytes.get();
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
      free(adapters.remove(name));
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
      active = select(weights, false, true);
      former.leavesSpares = !active.filled.choice.weights.isEmpty();
      former.close();
      if (former.leavesSpares) {
        settle();
      } else {
        closeSpares();
      }
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
   *
   * <p>Not for CUDA graphs: a captured call keeps the memory of the choice of that moment, which a later choice fills
   * anew. Capture the layers of a {@link Selection}; or, for graphs that follow a swap, {@link AdapterSlots}, which
   * {@link PinnedAdapter#fill} swaps for a whole model.
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
    return select(weights, false, false);
  }

  /**
   * A choice from which each row takes one adapter, or none: {@link Selection#slot} is its number for
   * {@link ForwardCall#rowSlots}, on all layers. Where a call has no such numbers, every row uses all of them.
   *
   * @throws OctoloraException also {@link Status#UNSUPPORTED} for an adapter with magnitudes, which changes the base of
   *     all rows, and {@link Status#OUT_OF_MEMORY}, with nothing kept
   */
  public Selection selectForRows(Map<String, Float> weights) {
    return select(weights, true, false);
  }

  private Selection select(Map<String, Float> weights, boolean forRows, boolean fromSpares) {
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
        slots = fill(choice, fromSpares);
        filled.put(choice, slots);
      }
      slots.selections++;
      return new Selection(this, weights, slots);
    } finally {
      changes.unlock();
    }
  }

  /**
   * What a choice puts on a layer: in slot i the i-th of these adapters, or nothing where it is not on this layer.
   * There may be more slots than adapters.
   */
  private record Part(Int8Linear layer, List<Adapter> adapters, int[] capacity, boolean magnitudes) {
    @Nullable HostAdapter factors(int slot) {
      return slot < adapters.size() ? adapters.get(slot).layers.get(layer.name) : null;
    }
  }

  private List<Part> parts(Choice choice) {
    List<Part> parts = new ArrayList<>();
    for (Int8Linear layer : layers.values()) {
      List<Adapter> here = new ArrayList<>(choice.weights.keySet());
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
      int[] ranks = new int[here.size()];
      for (int i = 0; i < ranks.length; i++) {
        HostAdapter factors = here.get(i).layers.get(layer.name);
        ranks[i] = factors == null ? 1 : factors.rank;
        if (factors != null && factors.magnitude != null) {
          magnitudes = true;
          if (choice.forRows) {
            throw new OctoloraException(Status.UNSUPPORTED, ("adapter %s has magnitudes (DoRA) on %s: they change "
                + "the base of all rows, so no row can take it alone").formatted(here.get(i).name, layer.name));
          }
        }
      }
      boolean within = capacity != null && !magnitudes && capacity.holds(ranks);
      parts.add(new Part(layer, here, within ? capacity.ranks() : ranks, magnitudes));
    }
    return parts;
  }

  /** @param fromSpares whether to take what the former active choice left */
  private Filled fill(Choice choice, boolean fromSpares) {
    List<Part> parts = parts(choice);
    Map<String, Storage> taken = new HashMap<>();
    if (fromSpares) {
      settle();
      for (Part part : parts) {
        Storage ready = part.magnitudes ? null : reserved(part);
        if (ready != null) {
          taken.put(part.layer.name, ready);
          continue;
        }
        Storage spare = spares.get(part.layer.name);
        if (spare != null && spare.idle && spare.magnitudes == part.magnitudes
            && Arrays.equals(spare.capacity, part.capacity)) {
          spares.remove(part.layer.name, spare);
          taken.put(part.layer.name, spare);
        }
      }
      closeSpares();
    }
    try {
      return fill(choice, parts, taken);
    } catch (OctoloraException failure) {
      if (failure.status() != Status.OUT_OF_MEMORY || spares.isEmpty()) {
        throw failure;
      }
      closeSpares();
      return fill(choice, parts, taken);
    }
  }

  /** Takes it out; null where there is none for these ranks that no work reads. */
  private @Nullable Storage reserved(Part part) {
    if (capacity == null || !Arrays.equals(part.capacity, capacity.ranks())) {
      return null;
    }
    Queue<Storage> there = reserve.get(part.layer.name);
    for (Storage one : there) {
      if (one.idle && there.remove(one)) {
        return one;
      }
    }
    return null;
  }

  /** @param taken storage by layer, which is taken out */
  private Filled fill(Choice choice, List<Part> parts, Map<String, Storage> taken) {
    Filled fresh = new Filled(choice);
    boolean complete = false;
    try {
      Map<NativeHandle, SlotFills> fills = new LinkedHashMap<>(); // by device
      for (Part part : parts) {
        Storage storage = taken.remove(part.layer.name);
        if (storage == null) {
          storage = new Storage(part.layer, precision, part.magnitudes, part.capacity, false);
        }
        AdapterSlots slots = slots(fresh, storage);
        fresh.slots.put(part.layer.name, slots);
        if (part.layer.linear.isClosed()) {
          throw part.layer.linear.closed();
        }
        SlotFills here = fills.computeIfAbsent(part.layer.device, device -> new SlotFills());
        for (int i = 0; i < part.capacity.length; i++) {
          HostAdapter factors = part.factors(i);
          if (factors != null) {
            slots.fill(here, i, factors, choice.weights.get(part.adapters.get(i)));
          } else if (i < storage.used) {
            slots.clear(i, streams.get(part.layer.device).address());
          }
        }
        storage.used = part.adapters.size();
      }
      for (Map.Entry<NativeHandle, SlotFills> one : fills.entrySet()) {
        Stream stream = streams.get(one.getKey());
        one.getValue().run(stream.address());
        stream.synchronize();
      }
      complete = true;
      return fresh;
    } finally {
      if (!complete) {
        fresh.close();
        taken.values().forEach(this::giveBack);
      }
    }
  }

  /** Storage that was taken and not filled. */
  private void giveBack(Storage storage) {
    if (storage.reserved && !closed) {
      reserve.get(storage.layer.name).add(storage);
    } else {
      storage.handle.close();
    }
  }

  /** The storage in the hands of one choice: closed, it is spare or freed when the last call that uses it is out. */
  private AdapterSlots slots(Filled filled, Storage storage) {
    NativeHandle handle = new NativeHandle(storage.handle.toString(), storage.handle.address(), none -> {
      if (closed || !filled.reusable && !storage.reserved) {
        storage.handle.close();
        return;
      }
      storage.idle = false;
      if (storage.reserved) {
        reserve.get(storage.layer.name).add(storage);
        if (closed) { // meanwhile, perhaps without having seen this one
          closeReserve();
        }
        return;
      }
      Storage former = spares.put(storage.layer.name, storage);
      if (former != null) {
        former.handle.close();
      }
      if (closed || active.filled.choice.weights.isEmpty()) { // meanwhile, perhaps without having seen this one
        closeSpares();
      }
    });
    return new AdapterSlots(storage.layer, handle, storage.capacity, precision);
  }

  /** Waits for the work that may still read spare storage. */
  private void settle() {
    List<Storage> busy = new ArrayList<>(spares.values());
    reserve.values().forEach(busy::addAll);
    busy.removeIf(spare -> spare.idle);
    busy.stream().map(spare -> spare.layer.device).distinct()
        .forEach(device -> NativeLibrary.check(NativeOctolora.deviceSynchronize(device.address())));
    busy.forEach(spare -> spare.idle = true);
  }

  private void closeSpares() {
    for (Map.Entry<String, Storage> spare : spares.entrySet()) {
      if (spares.remove(spare.getKey(), spare.getValue())) {
        spare.getValue().handle.close();
      }
    }
  }

  private void closeReserve() {
    reserve.values().forEach(there -> {
      for (Storage one = there.poll(); one != null; one = there.poll()) {
        one.handle.close();
      }
    });
  }

  private void release(Filled slots, boolean leavesSpares) {
    changes.lock();
    try {
      if (--slots.selections > 0) {
        return;
      }
      filled.remove(slots.choice);
    } finally {
      changes.unlock();
    }
    slots.reusable = leavesSpares;
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
    /** Whether closing it leaves storage for the next active choice; written before by who closes it. */
    private boolean leavesSpares;

    private Selection(AdapterSet set, Map<String, Float> weights, Filled filled) {
      this.layers = set.layers;
      this.weights = Collections.unmodifiableMap(new LinkedHashMap<>(weights));
      this.filled = filled;
      this.handle = new NativeHandle("Selection " + this.weights, 0, none -> set.release(filled, leavesSpares));
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
      closeSpares();
      closeReserve();
      streams.values().forEach(Stream::close);
      adapters.values().forEach(this::free);
      adapters.clear();
    } finally {
      changes.unlock();
    }
  }

  @Override
  public String toString() {
    return "AdapterSet of %d layers".formatted(layers.size());
  }
}

// SPDX-License-Identifier: Apache-2.0
//
// One call, x[M,K] to y[M,N] of every output, as steps whose tasks run on all threads:
//
//   1  measure   only with an outlier threshold: the absolute maximum of every row, the outlier columns of the call
//   then for every kPassRows rows, so that the scratch does not grow with M:
//   2  prepare   rows of x become codes (W8A8) or fp32 (W8A16); and beside it, H = c·(x·Aᵀ) of every active slot, fp32
//   3  multiply  a task owns a panel of one output's channels and a chunk of rows: base product, outliers, s_w, H·Bᵀ,
//                bias, activation, gate, residual, store
//
// Where rows name the slots that they use, steps 2 and 3 multiply the runs of rows that share one.
//
// A task computes the same bits whichever thread runs it, and a row the same bits whatever rows stand beside it.
#include <cstring>
#include <limits>

#include "float_environment.h"
#include "linear.h"

namespace octolora::cpu {

namespace {

constexpr int64_t kPassRows = 512;
// Rows of a prepare and of a multiply task, brought down to a multiple of the register tile. The multiply task's tiles
// lie on the stack: 2 * 64 * 48 * 4 bytes.
constexpr int kPrepareRows = 32, kChunkRows = 64;
// Piece of a row that is widened, measured and quantized in the first cache.
constexpr int64_t kPiece = 2048;
// The same for x·Aᵀ, where kPrepareRows rows share it.
constexpr int64_t kDownPiece = 256;
// k multiplied in one go: a panel of it fits the second cache beside a chunk of rows. Where a few rows are all there
// are, so little that while the last of them meet a piece, the next one is on its way from memory.
constexpr int64_t kDepth = 4096, kShallowDepth = kPrefetchBytes / kColumns;
static_assert(kDepth % kScaleBlock == 0 && kShallowDepth % kScaleBlock == 0);
// Outlier columns multiplied in one go.
constexpr int64_t kOutlierPiece = 64;
// Multiplications below which waking a thread takes longer than it saves.
constexpr int64_t kWorthThreads = 1 << 20;

float float_of(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}
uint32_t bits_of(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits;
}

// Bytes from row to row: whole cache lines, an odd number of them, so that rows of a tile fall into different sets.
constexpr int64_t row_bytes(int64_t bytes) { return round_up(bytes, 64) | 64; }

// Offsets of the pieces of the caller's workspace.
struct Scratch {
  int64_t pass_rows;     // rows of everything that lives for one pass
  int64_t code_bytes;    // from row to row of codes
  int64_t float_stride;  // from row to row of x as fp32, or of its outlier columns
  size_t codes = 0, row_scale = 0, row_sum = 0, floats = 0, paired = 0, low_rank = 0, magnitudes = 0, flags = 0,
         outliers = 0;
  size_t total = 0;

  Scratch(const Kernels& kernels, const LinearSpec& spec, const Panels& panels, int64_t low_rank_columns, int64_t rows)
      : pass_rows(std::min(rows, kPassRows)),
        code_bytes(row_bytes(panels.depth() * kernels.code_bytes)),
        float_stride(row_bytes(panels.k * 4) / 4) {
    const bool outliers_out = spec.mode == Mode::dynamic && spec.outlier_threshold > 0.f;
    if (spec.mode != Mode::w8a16) {
      codes = take(pass_rows * code_bytes);
      row_scale = take(pass_rows * 4);
      row_sum = take(pass_rows * 4);
    }
    if (spec.mode == Mode::w8a16 || outliers_out) floats = take(pass_rows * float_stride * 4);
    if (spec.mode == Mode::w8a16) paired = take(pass_rows);
    if (outliers_out) {
      magnitudes = take(rows * static_cast<int64_t>(sizeof(Magnitudes)));
      flags = take(spec.k);
      outliers = take(int64_t{spec.k} * 4);
    }
    low_rank = take(pass_rows * low_rank_columns * 4);
  }

 private:
  size_t take(int64_t bytes) {
    const size_t at = total;
    total += static_cast<size_t>(round_up(bytes, static_cast<int64_t>(kAlignment)));
    return at;
  }
};

}  // namespace

// One call in progress.
class Pass {
 public:
  explicit Pass(const ForwardArgs& args)
      : args_(args),
        linear_(*static_cast<const CpuLinear*>(args.outputs[0].linear)),
        spec_(linear_.spec),
        kernels_(linear_.context_->kernels),
        panels_(linear_.panels_),
        x_(static_cast<const char*>(args.x)),
        x_type_(args.x_type),
        rows_(args.rows),
        scratch_(kernels_, spec_, panels_, low_rank_columns(args), args.rows),
        low_rank_stride_(low_rank_columns(args)),
        pool_(linear_.context_->pool, worth_threads(args)) {
    int64_t column = 0;
    for (int i = 0; i < args.output_count; ++i) {
      const Output& output = args.outputs[i];
      Member& member = members_[i];
      member = {&output, static_cast<const CpuLinear*>(output.linear), static_cast<const CpuSlots*>(output.slots),
                column};
      if (member.slots != nullptr) column += member.slots->columns();
    }
    char* base = static_cast<char*>(args.workspace);
    codes_ = base + scratch_.codes;
    row_scale_ = reinterpret_cast<float*>(base + scratch_.row_scale);
    row_sum_ = reinterpret_cast<int32_t*>(base + scratch_.row_sum);
    floats_ = reinterpret_cast<float*>(base + scratch_.floats);
    low_rank_ = reinterpret_cast<float*>(base + scratch_.low_rank);
    magnitudes_ = reinterpret_cast<Magnitudes*>(base + scratch_.magnitudes);
    paired_ = reinterpret_cast<uint8_t*>(base + scratch_.paired);
    flags_ = reinterpret_cast<uint8_t*>(base + scratch_.flags);
    outliers_ = reinterpret_cast<int32_t*>(base + scratch_.outliers);
  }

  static size_t workspace(const ForwardArgs& args) {
    const auto& linear = *static_cast<const CpuLinear*>(args.outputs[0].linear);
    return Scratch(linear.context_->kernels, linear.spec, linear.panels_, low_rank_columns(args), args.rows).total;
  }

  static void explain(const ForwardArgs& args, Explanation& to) {
    const auto& linear = *static_cast<const CpuLinear*>(args.outputs[0].linear);
    const Kernels& kernels = linear.context_->kernels;
    const bool threaded = worth_threads(args);
    to.note("cpu: %s, %d of %d threads%s", kernels.name, threaded ? linear.context_->pool.threads() : 1,
            linear.context_->pool.threads(), threaded ? "" : ", since more would take longer to wake than they save");
    to.note("%lld rows at a time, %lld columns of x.A^T",
            static_cast<long long>(std::min<int64_t>(args.rows, kPassRows)),
            static_cast<long long>(low_rank_columns(args)));
    for (int i = 0; i < args.output_count; ++i) {
      const Panels& panels = static_cast<const CpuLinear*>(args.outputs[i].linear)->panels_;
      to.note("N = %lld: in %lld panels of %d channels%s; %d rows of x in a register tile",
              static_cast<long long>(panels.rows), static_cast<long long>(panels.count()), kColumns,
              args.outputs[i].linear->spec.scale_block ? " with block scales" : "", kernels.rows);
    }
  }

  void forward() {
    measure_all();
    for (int64_t first = 0; first < rows_; first += kPassRows) {
      const int64_t count = std::min(kPassRows, rows_ - first);
      prepare(first, count, nullptr, nullptr);
      for_panels_and_chunks(count, [&](const Member& member, int64_t panel, int64_t row, int chunk) {
        alignas(64) float tile[kChunkRows * kColumns];
        const CpuLinear& linear = *member.linear;
        if (spec_.mode == Mode::w8a16) {
          for (int begin = 0, end; begin < chunk; begin = end) {
            for (end = begin + 1; end < chunk && paired_[row + end] == paired_[row + begin];) ++end;
            multiply_floats(linear, panel, row + begin, end - begin, tile + begin * kColumns);
          }
        } else {
          alignas(64) int32_t sums[kChunkRows * kColumns];
          multiply_codes(linear, panel, row, chunk, sums);
          for (int i = 0; i < chunk; ++i) {
            kernels_.scale_sums(sums + i * kColumns, linear.panels_.width(panel), correction(row + i),
                                row_scale_[row + i], tile + i * kColumns);
          }
          add_outliers(linear, panel, row, chunk, tile);
        }
        finish(member, panel, row, chunk, tile, first);
      });
    }
  }

  void quantized(int32_t* sums, int8_t* codes, float* row_scale) {
    measure_all();
    for (int64_t first = 0; first < rows_; first += kPassRows) {
      const int64_t count = std::min(kPassRows, rows_ - first);
      prepare(first, count, codes, row_scale);
      if (sums == nullptr) continue;
      for_panels_and_chunks(count, [&](const Member&, int64_t panel, int64_t row, int chunk) {
        alignas(64) int32_t tile[kChunkRows * kColumns];
        multiply_codes(linear_, panel, row, chunk, tile);
        const int width = panels_.rows_of(panel);
        for (int i = 0; i < chunk; ++i) {
          int32_t* to = sums + (first + row + i) * spec_.n + panel * kColumns;
          const int32_t* from = tile + i * kColumns;
          const uint32_t excess = static_cast<uint32_t>(correction(row + i));
          for (int j = 0; j < width; ++j) to[j] = static_cast<int32_t>(static_cast<uint32_t>(from[j]) - excess);
        }
      });
    }
  }

 private:
  struct Member {
    const Output* output;
    const CpuLinear* linear;
    const CpuSlots* slots;  // may be null
    int64_t first_column;   // of H
  };

  static int64_t low_rank_columns(const ForwardArgs& args) {
    int64_t columns = 0;
    for (int i = 0; i < args.output_count; ++i) {
      if (args.outputs[i].slots != nullptr) columns += static_cast<const CpuSlots*>(args.outputs[i].slots)->columns();
    }
    return columns;
  }

  bool with_outliers() const { return spec_.mode == Mode::dynamic && spec_.outlier_threshold > 0.f; }

  static bool worth_threads(const ForwardArgs& args) {
    const int64_t k = args.outputs[0].linear->spec.k;
    int64_t multiplications = low_rank_columns(args) * k;
    for (int i = 0; i < args.output_count; ++i) {
      const auto* slots = static_cast<const CpuSlots*>(args.outputs[i].slots);
      multiplications += args.outputs[i].linear->spec.n * (k + (slots != nullptr ? slots->columns() : 0));
    }
    return multiplications >= kWorthThreads / args.rows;
  }

  // visit(first, count) for each run of rows among begin .. begin + rows - 1 of x, counted from begin, that use a slot.
  template <class Visit>
  void each_run(int slot, int64_t begin, int rows, const Visit& visit) const {
    if (args_.row_slot == nullptr) return visit(0, rows);
    const int32_t* row_slot = args_.row_slot + begin;
    for (int first = 0; first < rows;) {
      int end = first;
      while (end < rows && row_slot[end] == slot) ++end;
      if (end > first) visit(first, end - first);
      first = end + 1;
    }
  }

  const char* x_at(int64_t row, int64_t k) const {
    return x_ + (row * spec_.k + k) * static_cast<int64_t>(size_of(x_type_));
  }

  // What the int8 product has too much, because stored weights are shifted.
  int32_t correction(int64_t row) const {
    return static_cast<int32_t>(static_cast<uint32_t>(kernels_.weight_shift) * static_cast<uint32_t>(row_sum_[row]));
  }

  // Row `row` of x; its outlier columns are flagged. With a static scale nothing is measured but whether x is finite.
  Magnitudes measure(int64_t row) {
    const bool round = spec_.round_x_to_f16 && spec_.mode == Mode::dynamic;
    const uint32_t limit = with_outliers() ? bits_of(spec_.outlier_threshold) : kNoLimit;
    float piece[kPiece];
    Magnitudes magnitudes;
    for (int64_t k = 0; k < spec_.k; k += kPiece) {
      const int64_t count = std::min(kPiece, spec_.k - k);
      kernels_.widen(x_at(row, k), x_type_, count, piece);
      if (round) kernels_.round_f16(piece, count);
      kernels_.measure(piece, count, limit, &magnitudes);
      if (magnitudes.all >= limit) kernels_.flag_reached(piece, count, limit, flags_ + k);
    }
    return magnitudes;
  }

  void measure_all() {
    outlier_count_ = 0;
    if (!with_outliers()) return;
    std::memset(flags_, 0, static_cast<size_t>(spec_.k));
    pool_.run((rows_ + kPrepareRows - 1) / kPrepareRows, [&](int64_t task) {
      const int64_t end = std::min(rows_, (task + 1) * kPrepareRows);
      for (int64_t row = task * kPrepareRows; row < end; ++row) magnitudes_[row] = measure(row);
    });
    for (int32_t k = 0; k < spec_.k; ++k)
      if (flags_[k] != 0) outliers_[outlier_count_++] = k;
  }

  // Rows first .. first + count - 1 of x, which become rows 0 .. count - 1 of the scratch.
  void prepare(int64_t first, int64_t count, int8_t* codes, float* row_scale) {
    const int64_t group = kPrepareRows / kernels_.rows * kernels_.rows;
    const int64_t groups = (count + group - 1) / group;
    const int64_t down_tasks = down_tasks_per_group();
    pool_.run(groups * (1 + down_tasks), [&](int64_t task) {
      const int64_t row = task / (1 + down_tasks) * group;
      const int rows = static_cast<int>(std::min(group, count - row));
      const int64_t part = task % (1 + down_tasks);
      if (part > 0) return down(first, row, rows, part - 1);
      for (int i = 0; i < rows; ++i) {
        if (spec_.mode == Mode::w8a16) {
          keep(first + row + i, row + i);
        } else {
          quantize(first + row + i, row + i, codes);
          if (row_scale != nullptr) row_scale[first + row + i] = row_scale_[row + i];
        }
      }
    });
  }

  // Row `row` of x to row `at` of the scratch: as it is where the kernels multiply pairs of bf16, else as fp32.
  void keep(int64_t row, int64_t at) {
    const char* x = x_at(row, 0);
    float* to = floats_ + at * scratch_.float_stride;
    paired_[at] = kernels_.multiply_pairs != nullptr && x_type_ == Dtype::bf16 && kernels_.fits_pairs(x, spec_.k);
    if (!paired_[at]) return kernels_.widen(x, x_type_, spec_.k, to);
    to[spec_.k / 2] = 0.f;  // beside the last of an odd number
    std::memcpy(to, x, static_cast<size_t>(spec_.k) * 2);
  }

  // Row `row` of x to row `at` of the scratch, quantized. A row with a NaN, or with an infinity that is not an outlier,
  // gets a scale that is not finite, which makes all of it NaN; its codes stay defined.
  void quantize(int64_t row, int64_t at, int8_t* codes_out) {
    const Magnitudes magnitudes = with_outliers() ? magnitudes_[row] : measure(row);
    const bool fixed = spec_.mode == Mode::fixed;
    const float a = float_of(magnitudes.below);
    const float factor = fixed ? spec_.x_scale : spec_.x_divisor / a;
    float scale = fixed ? spec_.x_scale : a / spec_.x_divisor;
    if (magnitudes.all > kInfinityBits || (fixed && magnitudes.all == kInfinityBits))
      scale = std::numeric_limits<float>::quiet_NaN();
    row_scale_[at] = scale;
    float piece[kPiece];
    int8_t q[kPiece];
    char* codes = codes_ + at * scratch_.code_bytes;
    float* gathered = floats_ + at * scratch_.float_stride;
    int32_t sum = 0;
    int64_t outlier = 0;
    for (int64_t k = 0; k < spec_.k; k += kPiece) {
      const int64_t count = std::min(kPiece, spec_.k - k);
      kernels_.widen(x_at(row, k), x_type_, count, piece);
      int64_t end = outlier;
      for (; end < outlier_count_ && outliers_[end] < k + count; ++end) gathered[end] = piece[outliers_[end] - k];
      if (spec_.round_x_to_f16) kernels_.round_f16(piece, count);
      sum += kernels_.quantize(piece, count, factor, fixed, q);
      for (; outlier < end; ++outlier) {
        int8_t& out = q[outliers_[outlier] - k];
        sum -= out;
        out = 0;
      }
      kernels_.store_codes(q, count, codes + k * kernels_.code_bytes);
      if (codes_out != nullptr) std::memcpy(codes_out + row * spec_.k + k, q, static_cast<size_t>(count));
    }
    row_sum_[at] = sum;
    const int64_t used = spec_.k * kernels_.code_bytes, padded = panels_.depth() * kernels_.code_bytes;
    std::memset(codes + used, 0, static_cast<size_t>(padded - used));
  }

  // x·Aᵀ is cut into tasks of a panel of ranks: those of one slot in one group of rows share the widened x.
  int64_t down_tasks_of(const CpuSlots& slots, const CpuSlots::Slot& slot) const {
    return slot.active() ? slots.a_panels(slot.rank).count() : 0;
  }

  int64_t down_tasks_per_group() const {
    int64_t tasks = 0;
    for (int i = 0; i < args_.output_count; ++i) {
      const CpuSlots* slots = members_[i].slots;
      if (slots == nullptr) continue;
      for (const CpuSlots::Slot& slot : slots->slots()) tasks += down_tasks_of(*slots, slot);
    }
    return tasks;
  }

  // Task `part` of those of all active slots of all outputs, for rows first + row .. of x.
  void down(int64_t first, int64_t row, int rows, int64_t part) {
    for (int i = 0; i < args_.output_count; ++i) {
      const CpuSlots* slots = members_[i].slots;
      if (slots == nullptr) continue;
      for (size_t slot = 0; slot < slots->slots().size(); ++slot) {
        const int64_t tasks = down_tasks_of(*slots, slots->slots()[slot]);
        if (part < tasks) {
          each_run(static_cast<int>(slot), first + row, rows, [&](int begin, int count) {
            down_run(members_[i], slots->slots()[slot], first, row + begin, count, part);
          });
          return;
        }
        part -= tasks;
      }
    }
  }

  void down_run(const Member& member, const CpuSlots::Slot& slot, int64_t first, int64_t row, int rows, int64_t panel) {
    const Panels a = member.slots->a_panels(slot.rank);
    const int width = a.width(panel), there = a.rows_of(panel);
    float* h = h_at(member, slot, row) + panel * kColumns;
    alignas(64) float piece[kPrepareRows * kDownPiece];
    for (int64_t k = 0; k < spec_.k; k += kDownPiece) {
      const int64_t terms = std::min(kDownPiece, spec_.k - k);
      for (int i = 0; i < rows; ++i) kernels_.widen(x_at(first + row + i, k), x_type_, terms, piece + i * kDownPiece);
      kernels_.multiply_float(rows, width / kernels_.lanes, slot.a.data() + a.offset(panel) + k * width, piece,
                              kDownPiece, terms, h, low_rank_stride_, k > 0);
    }
    for (int i = 0; i < rows; ++i)
      for (int r = 0; r < there; ++r) h[i * low_rank_stride_ + r] *= *slot.scale;
  }

  float* h_at(const Member& member, const CpuSlots::Slot& slot, int64_t row) const {
    return low_rank_ + row * low_rank_stride_ + member.first_column + slot.first_column;
  }

  // Chunks of one panel follow each other: the threads share what is in the caches of the panel.
  template <class Task>
  void for_panels_and_chunks(int64_t count, const Task& task) {
    const int64_t chunk = kChunkRows / kernels_.rows * kernels_.rows;
    const int64_t chunks = (count + chunk - 1) / chunk;
    int64_t panels = 0;
    for (int i = 0; i < args_.output_count; ++i) panels += members_[i].linear->panels_.count();
    pool_.run(panels * chunks, [&](int64_t i) {
      const int64_t row = i % chunks * chunk;
      int64_t panel = i / chunks;
      const Member* member = members_;
      for (; panel >= member->linear->panels_.count(); ++member) panel -= member->linear->panels_.count();
      task(*member, panel, row, static_cast<int>(std::min(chunk, count - row)));
    });
  }

  static const uint8_t* weights_at(const CpuLinear& linear, int64_t panel, int64_t k) {
    return linear.weight_.data() + linear.panels_.offset(panel) + k * linear.panels_.width(panel);
  }

  void multiply_codes(const CpuLinear& linear, int64_t panel, int64_t row, int chunk, int32_t* tile) const {
    const bool shallow = rows_ > 1 && rows_ <= kChunkRows;
    const int64_t depth = linear.panels_.depth(), step = shallow ? kShallowDepth : kDepth;
    for (int64_t k = 0; k < depth; k += step) {
      kernels_.multiply_codes(chunk, linear.panels_.width(panel) / kernels_.lanes, weights_at(linear, panel, k),
                              codes_ + row * scratch_.code_bytes + k * kernels_.code_bytes,
                              scratch_.code_bytes / kernels_.code_bytes, std::min(step, depth - k), tile, kColumns,
                              k > 0);
    }
  }

  // Rows that are all paired, or none of them.
  void multiply_floats(const CpuLinear& linear, int64_t panel, int64_t row, int chunk, float* tile) const {
    alignas(64) float scales[kDepth / kScaleBlock * kColumns];
    for (int64_t k = 0; k < spec_.k; k += kDepth) {
      const float* block_scales = nullptr;
      if (linear.spec.scale_block) {
        const Panels& blocks = linear.block_panels_;
        const int64_t first = k / kScaleBlock, count = std::min(kDepth / kScaleBlock, blocks.k - first);
        const int width = blocks.width(panel);
        kernels_.widen(linear.block_scale_.data() + blocks.offset(panel) + first * width, Dtype::f16, count * width,
                       scales);
        block_scales = scales;
      }
      const auto* weights = reinterpret_cast<const int8_t*>(weights_at(linear, panel, k));
      const int vectors = linear.panels_.width(panel) / kernels_.lanes;
      const int64_t terms = std::min(kDepth, spec_.k - k);
      if (paired_[row]) {
        const uint32_t* x = reinterpret_cast<const uint32_t*>(floats_ + row * scratch_.float_stride) + k / 2;
        kernels_.multiply_pairs(chunk, vectors, weights, block_scales, x, scratch_.float_stride, (terms + 1) / 2, tile,
                                kColumns, k > 0);
      } else {
        const float* x = floats_ + row * scratch_.float_stride + k;
        kernels_.multiply_int8(chunk, vectors, weights, block_scales, x, scratch_.float_stride, terms, tile, kColumns,
                               k > 0);
      }
    }
  }

  // tile += Σ_{k in O} x[m,k]·W[n,k], the columns' weights gathered from the panel.
  void add_outliers(const CpuLinear& linear, int64_t panel, int64_t row, int chunk, float* tile) const {
    const int width = linear.panels_.width(panel), group = linear.panels_.group;
    for (int64_t first = 0; first < outlier_count_; first += kOutlierPiece) {
      const int64_t terms = std::min(kOutlierPiece, outlier_count_ - first);
      alignas(64) float weights[kOutlierPiece * kColumns];
      for (int64_t i = 0; i < terms; ++i) {
        const int64_t k = outliers_[first + i];
        const uint8_t* from = weights_at(linear, panel, k / group * group) + k % group;
        for (int j = 0; j < width; ++j)
          weights[i * width + j] = static_cast<float>(static_cast<int8_t>(from[j * group] ^ linear.flip_));
      }
      multiply_low_rank(chunk, width, weights, floats_ + row * scratch_.float_stride + first, scratch_.float_stride,
                        terms, tile);
    }
  }

  // tile[chunk, width] += left[chunk, terms] · right[terms, width]
  void multiply_low_rank(int chunk, int width, const float* right, const float* left, int64_t left_stride,
                         int64_t terms, float* tile) const {
    kernels_.multiply_float(chunk, width / kernels_.lanes, right, left, left_stride, terms, tile, kColumns, true);
  }

  // s_w, adapters, bias, what the output asks for after them, and the one rounding to y's type.
  void finish(const Member& member, int64_t panel, int64_t row, int chunk, float* tile, int64_t first) const {
    const CpuLinear& linear = *member.linear;
    const int width = linear.panels_.width(panel), there = linear.panels_.rows_of(panel);
    const int64_t channel = panel * kColumns;
    for (int i = 0; i < chunk; ++i) kernels_.multiply_by(tile + i * kColumns, linear.scale_.data() + channel, width);
    const size_t slot_count = member.slots != nullptr ? member.slots->slots().size() : 0;
    for (size_t index = 0; index < slot_count; ++index) {
      const CpuSlots::Slot& slot = member.slots->slots()[index];
      if (!slot.active()) continue;
      each_run(static_cast<int>(index), first + row, chunk, [&](int begin, int count) {
        float* v = tile + begin * kColumns;
        multiply_low_rank(count, width, slot.b.data() + member.slots->b_panels(slot.rank).offset(panel),
                          h_at(member, slot, row + begin), low_rank_stride_, slot.rank, v);
        for (int i = 0; i < count; ++i, v += kColumns) {
          if (slot.has_bias) kernels_.add_scaled(v, *slot.scale, slot.bias.data() + channel, width);
          if (slot.has_magnitude) kernels_.multiply_by(v, slot.factor.data() + channel, width);
        }
      });
    }
    const Output& output = *member.output;
    const int64_t element = static_cast<int64_t>(size_of(args_.y_type));
    alignas(64) float gate[kColumns], residual[kColumns];
    if (output.gate != nullptr)
      kernels_.widen(static_cast<const char*>(output.gate) + channel * element, args_.y_type, there, gate);
    for (int i = 0; i < chunk; ++i) {
      float* v = tile + i * kColumns;
      const int64_t at = ((first + row + i) * linear.spec.n + channel) * element;
      if (linear.has_bias_) kernels_.add_scaled(v, 1.f, linear.bias_.data() + channel, width);
      if (output.activation != Activation::none) kernels_.activate(v, there, output.activation);
      if (output.gate != nullptr) kernels_.multiply_by(v, gate, there);
      if (output.residual != nullptr) {
        kernels_.widen(static_cast<const char*>(output.residual) + at, args_.y_type, there, residual);
        kernels_.add_scaled(v, 1.f, residual, there);
      }
      kernels_.narrow(v, there, args_.y_type, static_cast<char*>(output.y) + at);
    }
  }

  const ForwardArgs& args_;
  Member members_[OCTOLORA_MAX_OUTPUTS];
  const CpuLinear& linear_;  // the first, for what all of them share
  const LinearSpec& spec_;
  const Kernels& kernels_;
  const Panels& panels_;
  const char* const x_;
  const Dtype x_type_;
  const int64_t rows_;
  const Scratch scratch_;
  const int64_t low_rank_stride_;
  DefaultFloatEnvironment environment_;
  ThreadPool::Lease pool_;

  char* codes_;             // [pass rows][code_bytes]
  float* row_scale_;        // s_x
  int32_t* row_sum_;        // Σ q
  float* floats_;           // W8A16: x as fp32; with outliers: their columns of x, side by side
  uint8_t* paired_;         // W8A16: 1 where a row of floats_ holds pairs of bf16 instead
  float* low_rank_;         // H, the slots of all outputs side by side
  Magnitudes* magnitudes_;  // of all rows of the call
  uint8_t* flags_;          // [k]
  int32_t* outliers_;       // the flagged k, ascending
  int64_t outlier_count_ = 0;
};

size_t forward_workspace(const ForwardArgs& args) { return Pass::workspace(args); }

void forward(const ForwardArgs& args) { Pass(args).forward(); }

void explain(const ForwardArgs& args, Explanation& to) { Pass::explain(args, to); }

void CpuLinear::quantized(const QuantizedArgs& q) const {
  ForwardArgs args;
  args.x = q.x;
  args.x_type = q.x_type;
  args.rows = q.rows;
  args.workspace = q.workspace;
  args.output_count = 1;
  args.outputs[0].linear = this;
  Pass(args).quantized(q.sums, q.codes, q.row_scale);
}

}  // namespace octolora::cpu

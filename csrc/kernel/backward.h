// Backward: the weights of a tile computed again from its lse, then four more products, chunk by chunk, rows in lanes.
//   P = exp(S - lse)    dS = P (dP - delta + dlse)    dV += P^T dO    dK += dS^T Q    dQ = dS K
#pragma once

#include <math.h>

#include "key_sums.h"
#include "points_backward.h"
#include "rows_ahead.h"
#include "scores.h"

namespace farlight::FARLIGHT_NS {

template <class Mode>
class Backward {
  using T = typename Mode::T;
  using Op = typename Mode::Op;
  using Word = typename Op::Word;

 public:
  using Session = typename Mode::Session;
  static constexpr int kKeptRows = parts_of<Mode> > 1 ? 2 : 0;  // kinds of rows kept with the columns: K and V

  Backward(const Call& call, const Item& item, Arena& arena)
      : call_(call),
        item_(item),
        dim_(call.dim),
        ld_(rounded(call.dim, 32)),
        keys_({call.k, item.batch, kv_head()}, dim_, call.plan->n_k),
        values_({call.v, item.batch, kv_head()}, dim_, call.plan->n_k),
        sources_{keys_.source(), values_.source()},
        columns_(keys_.source(), sources_, kKeptRows, dim_, item.batch * call.kv_heads + kv_head()),
        sums_(dim_),
        queries_(dim_),
        upstream_(dim_) {
    columns_.reserve(arena);
    recent_ = arena.take<Recent>(1);
    chunks_ = arena.take<Chunk>(2);
    keys_.reserve(arena, true, !in_tiles<Mode>);
    values_.reserve(arena, true, false);
    queries_.reserve(arena);
    upstream_.reserve(arena);
    query_rows_ = arena.take<Word>(parts_of<Mode> * kRows * ld_ / Op::per);
    upstream_rows_ = arena.take<Word>(parts_of<Mode> * kRows * ld_ / Op::per);
    scores_ = arena.take<float>(kKeys * kRows);
    slopes_ = arena.take<float>(kKeys * kRows);
    if (in_pairs<Mode>) {
      weight_rows_ = arena.take<Word>(parts_of<Mode> * kWeights);
      slope_rows_ = arena.take<Word>(parts_of<Mode> * kWeights);
      slope_columns_ = arena.take<Word>(parts_of<Mode> * kWeights);
    }
    sums_.reserve(arena);
    dq_ = arena.take<float>(rounded(dim_, 16) * kRows);
    dq_before_ = arena.take<float>(rounded(dim_, 16) * kRows);
    rows_ = arena.take<float>(kRows * ld_);
    query_ = arena.take<float>(ld_);
  }

  void run(int first_row, const Sums& sums, const Item* next) {
    const Tile tile(*call_.plan, item_, first_row);
    const Dropped dropped(call_.dropout, *call_.plan, tile);
    const Source<T> q(call_.q, item_.batch, item_.head), dout(call_.dout, item_.batch, item_.head);
    const float base2 = call_.scale * kLog2E, factor = scaled_first<Mode> ? 1.0f : base2;
    PointsAhead<T> points(tile, keys_.source(), values_.source(), dim_);
    [[maybe_unused]] SumsAhead sums_ahead(tile, sums, Lines::of_row<T>(dim_), dim_);
    [[maybe_unused]] RowsAhead rows_ahead(*call_.plan, Lines::of_row<T>(dim_));
    const Turn after = Turn{&item_, first_row}.after(*call_.plan, next);
    if constexpr (!in_tiles<Mode>) {
      rows_ahead.add(after, call_.q, sizeof(T));
      rows_ahead.add(after, call_.dout, sizeof(T));
      rows_ahead.add(after, call_.out, sizeof(T));
    }
    queries_.fetch(q, tile, scaled_first<Mode> ? base2 : 1.0f);
    upstream_.fetch(dout, tile, 1.0f);
    lay_rows(q, tile, query_rows_);
    lay_rows(dout, tile, upstream_rows_);
    prepare(tile, dout);
    sums_.begin();
    const int lanes = static_cast<int>(rounded(tile.count, kV * W));
    const int terms = (tile.count + Op::per - 1) / Op::per;
    uint32_t touched = 0;
    int done = 0;
    Walk walk(tile, chunk_of<Mode>, group_of<Mode>);
    bool more = walk.next(chunks_[0]);
    for (int which = 0; more; which ^= 1) {
      chunk_ = chunks_ + which;
      more = walk.next(chunks_[which ^ 1]);
      const Chunk& c = *chunk_;
      Ahead<Mode> ahead(more ? chunks_ + (which ^ 1) : nullptr, keys_, values_, columns_, points, recent_, dim_);
      for (int i = 0; i < c.n; ++i) touched |= c.seen[i];
      sums_.find(c, sums);
      if constexpr (in_tiles<Mode>) {
#if defined(FARLIGHT_ISA_AMX)
        columns_.fetch(c);
        score_tiles(c, keys_, columns_, 0, queries_, scores_, ahead);
        score_tiles(c, values_, columns_, 1, upstream_, slopes_, ahead);
#endif
      } else {
        keys_.fetch_rows(c, true);
        values_.fetch_rows(c);
        score<Mode, false>(c, keys_, queries_, lanes, scores_, nullptr, [&](int block) { return ahead.lines(block); });
        score<Mode, false>(c, values_, upstream_, lanes, slopes_, nullptr, [&](int) {
          const Lines* lines = sums_ahead.lines();
          return lines ? lines : rows_ahead.lines();
        });
      }
      differentiate(dropped, factor, lanes);
      sums_.add(c, weights(), upstream_rows_, slopes(), query_rows_, terms);
      if (done && done % kTogether == 0) put_by(done == kTogether);
      add_keys(lanes, done % kTogether == 0, ahead);
      ++done;
    }
    if (!done) {
      for (int s = 0; s < tile.count; ++s) std::memset(rows_ + s * ld_, 0, ld_ * sizeof(float));
    } else {
      if (done > kTogether) {
        put_by(false);
        float* const before = dq_before_;
        dq_before_ = dq_;
        dq_ = before;
      }
      turn_out(dq_, dim_, rows_, ld_);
    }
    if (tile.any_points()) touched |= add_points(tile, q, dout, dropped, sums);
    finish(tile, touched);
  }

  // Adds up the parts of a tile that was split, in their order.
  void join_parts() {
    const PieceView& piece = call_.plan->pieces[item_.piece];
    const int64_t first = item_.entry - piece.part[item_.entry];
    for (int skip = 0; skip < piece.count[item_.entry]; skip += kRows) {
      const Tile tile(*call_.plan, item_, skip);
      for (int s = 0; s < tile.count; ++s) {
        float* row = rows_ + s * ld_;
        const int parts = piece.parts[item_.entry];
        bool touched = false;
        for (int part = 0; part < parts; ++part) touched |= partial(first + part)[(skip + s) * (dim_ + 2)] != 0.0f;
        for (int64_t d = 0; d < dim_; ++d) {
          double sum = 0.0;  // there may be a thousand parts
          for (int part = 0; part < parts; ++part) sum += partial(first + part)[(skip + s) * (dim_ + 2) + 2 + d];
          row[d] = static_cast<float>(sum);
        }
        write(tile.row[s], row, touched);
      }
    }
  }

 private:
  int64_t kv_head() const { return item_.head / (call_.heads / call_.kv_heads); }

  // Chunks that are added up in one place. Their sum then joins what came before: a row that sees thousands of chunks is
  // rounded as often as their number divided by this, and no oftener.
  static constexpr int kTogether = 16;

  void put_by(bool first) {
    for (int64_t i = 0; i < dim_ * kRows; i += W) {
      const F sum = load(dq_ + i);
      store(dq_before_ + i, first ? sum : add(load(dq_before_ + i), sum));
    }
  }

  // Rows as the operand of sums over rows: in pairs, word (i, d) holds rows 2i and 2i + 1.
  void lay_rows(const Source<T>& source, const Tile& tile, Word* to) {
    if constexpr (in_pairs<Mode>) {
#if defined(FARLIGHT_PAIRS)
      const int64_t part = kRows / 2 * ld_;
      for (int s = 0; s < tile.count; s += 2)
        interleave_rows(source.row(tile.row[s]), s + 1 < tile.count ? source.row(tile.row[s + 1]) : nullptr, dim_, to + s / 2 * ld_, part);
      const int pairs = (tile.count + 1) / 2;
      for (int p = 0; in_tiles<Mode> && p < parts_of<Mode>; ++p)
        std::memset(to + p * part + pairs * ld_, 0, (kRows / 2 - pairs) * ld_ * sizeof(Word));
#endif
    } else {
      for (int s = 0; s < tile.count; ++s) {
        copy_as_float(source.row(tile.row[s]), to + s * ld_, dim_);
        for (int64_t d = dim_; d < ld_; ++d) to[s * ld_ + d] = 0.0f;
      }
    }
  }

  // Reference, lse and delta - dlse of every row. A row that saw nothing gets weights of zero.
  void prepare(const Tile& tile, const Source<T>& dout) {
    const Source<T> out(call_.out, item_.batch, item_.head);
    for (int s = 0; s < kRows; ++s) {
      reference_[s] = lse_[s] = delta_[s] = 0.0f;
      if (s >= tile.count) continue;
      const int64_t at = (item_.batch * call_.heads + item_.head) * call_.plan->n_q + tile.row[s];
      lse_[s] = call_.lse[at] == -INFINITY ? -kNothing : call_.row_sums ? call_.row_sums[at].total : call_.lse[at];
      if (call_.row_sums) reference_[s] = call_.row_sums[at].top;
      delta_[s] = dot(dout.row(tile.row[s]), out.row(tile.row[s]), dim_) - (call_.dlse ? call_.dlse[at] : 0.0f);
    }
  }

  // From S and dP to P (with dropout) and dS, both times what the products need.
  void differentiate(const Dropped& dropped, float factor, int lanes) {
    const Chunk& c = *chunk_;
    if (call_.row_sums) {
      if (!scaled_first<Mode>) scale_scores(scores_, c.n, factor);
      subtract_references(scores_, c.n, reference_);
      factor = 1.0f;
    }
    const F scale = all(call_.scale * dropped.inverse()), inverse = all(dropped.inverse()), to_base2 = all(-kLog2E);
    for (int g = 0; g < lanes; g += kV * W) {
      F lse[kV], rest[kV];  // dS / P without dP
      for (int v = 0; v < kV; ++v) {
        lse[v] = scaled_first<Mode> ? load(lse_ + g + v * W) : mul(load(lse_ + g + v * W), to_base2);
        rest[v] = mul(load(delta_ + g + v * W), all(-call_.scale));
      }
      for (int i = 0; i < c.n; ++i) {
        const bool masked = c.masked[i / kM];
        F p[kV], ds[kV];
        FARLIGHT_UNROLL
        for (int v = 0; v < kV; ++v) {
          const int at = i * kRows + g + v * W;
          const F score = load(scores_ + at);
          // The lse's error is that of all weights of its row: in float32 it is not rounded on the way.
          p[v] = power2<Mode::degree>(scaled_first<Mode> ? fma(lse[v], to_base2, score) : fma(score, all(factor), lse[v]));
          if (masked) p[v] = choose(c.seen[i] >> (g + v * W), p[v], all(0.0f));
          F slope = fma(load(slopes_ + at), scale, rest[v]);
          if (dropped.on()) {
            const uint32_t kept = dropped.kept(c.key[i], g + v * W);
            slope = choose(kept, slope, rest[v]);
            ds[v] = mul(p[v], slope);
            p[v] = choose(kept, mul(p[v], inverse), all(0.0f));
          } else {
            ds[v] = mul(p[v], slope);
          }
          if (masked) ds[v] = choose(c.seen[i] >> (g + v * W), ds[v], all(0.0f));
        }
        keep(i, g, p, ds);
      }
    }
    if constexpr (in_pairs<Mode>) {
      if (in_tiles<Mode>) clear_rest();
      pair_slopes();
    }
  }

  FARLIGHT_INLINE void keep(int i, int g, const F (&p)[kV], const F (&ds)[kV]) {
    if constexpr (in_pairs<Mode>) {
#if defined(FARLIGHT_PAIRS)
      store_narrowed<parts_of<Mode>>(p[0], p[1], weight_rows_ + i * kRows / 2, kWeights);
      store_narrowed<parts_of<Mode>>(ds[0], ds[1], slope_rows_ + i * kRows / 2, kWeights);
#endif
    } else {
      FARLIGHT_UNROLL
      for (int v = 0; v < kV; ++v) {
        store(scores_ + i * kRows + g + v * W, p[v]);
        store(slopes_ + i * kRows + g + v * W, ds[v]);
      }
    }
  }

  // Keys that only fill up the last group have no weight.
  void clear_rest() {
    const int64_t rest = chunk_->blocks * kM - chunk_->n;
    for (int p = 0; rest && p < parts_of<Mode>; ++p) {
      const int64_t at = p * kWeights + chunk_->n * kRows / 2, bytes = rest * kRows / 2 * static_cast<int64_t>(sizeof(Word));
      std::memset(weight_rows_ + at, 0, bytes);
      std::memset(slope_rows_ + at, 0, bytes);
    }
  }

  // dS once more with neighbouring keys in one word, for dQ.
  void pair_slopes() {
#if defined(FARLIGHT_PAIRS)
    const int n = in_tiles<Mode> ? chunk_->blocks * kM : chunk_->n;
    for (int p = 0; p < parts_of<Mode>; ++p) {
      const Word* rows = slope_rows_ + p * kWeights;
      Word* columns = slope_columns_ + p * kWeights;
      for (int i = 0; i < n; i += 2) {
        I low, high;
        const I second = i + 1 < n ? load_i(rows + (i + 1) * kRows / 2) : all_i(0);
        interleave(load_i(rows + i * kRows / 2), second, low, high);
        store_i(columns + i / 2 * kRows, low);
        store_i(columns + i / 2 * kRows + W, high);
      }
    }
#endif
  }

  // P and dS, [key][row].
  const Word* weights() const {
    if constexpr (in_pairs<Mode>) return weight_rows_;
    else return scores_;
  }
  const Word* slopes() const {
    if constexpr (in_pairs<Mode>) return slope_rows_;
    else return slopes_;
  }

  // dQ^T += K^T dS^T.
  void add_keys(int lanes, bool fresh, Ahead<Mode>& ahead) {
    const Chunk& c = *chunk_;
    if constexpr (in_tiles<Mode>) {
#if defined(FARLIGHT_ISA_AMX)
      const int groups = (c.n + kDeep - 1) / kDeep;
      add_across_groups<parts_of<Mode>>(dq_, columns_.groups, columns_.part(), slope_columns_, kWeights, groups, dim_, fresh,
                                        [&] { ahead.some(); });
#endif
    } else {
      if constexpr (in_pairs<Mode>) keys_.fetch_columns(c, columns_);
      const Word* slopes;
      if constexpr (in_pairs<Mode>) slopes = slope_columns_;
      else slopes = slopes_;
      add_across<Op>(dq_, keys_.across, slopes, c.spans, dim_, lanes, fresh);
      (void)ahead;
    }
  }

  // The rows that have points.
  uint32_t add_points(const Tile& tile, const Source<T>& q, const Source<T>& dout, const Dropped& dropped, const Sums& sums) {
    PointGradients<T> points(tile, q, dout, keys_.source(), values_.source(), dim_, call_.scale, dropped, sums, reference_, lse_, delta_,
                             rows_, ld_);
    uint32_t touched = 0;
    for (int i = 0; i < tile.piece->layer_count; ++i)
      if (tile.has_points(tile.piece->layers[i])) touched |= points.take(tile.piece->layers[i]);
    return touched;
  }

  float* partial(int64_t entry) const {
    const PieceView& piece = call_.plan->pieces[item_.piece];
    const int64_t slot = call_.partial_base[item_.piece] + (item_.batch * call_.heads + item_.head) * piece.slots + piece.slot[entry];
    return call_.partial + slot * call_.plan->tile * (dim_ + 2);
  }

  void finish(const Tile& tile, uint32_t touched) {
    if (tile.piece->slot[item_.entry] < 0) {
      for (int s = 0; s < tile.count; ++s) write(tile.row[s], rows_ + s * ld_, (touched >> s) & 1);
      return;
    }
    float* at = partial(item_.entry) + tile.skip * (dim_ + 2);
    for (int s = 0; s < tile.count; ++s, at += dim_ + 2) {
      at[0] = (touched >> s) & 1 ? 1.0f : 0.0f;
      std::memcpy(at + 2, rows_ + s * ld_, dim_ * sizeof(float));
    }
  }

  void write(int64_t row, float* sum, bool touched) {
    const int64_t at = ((item_.batch * call_.heads + item_.head) * call_.plan->n_q + row) * dim_;
    if (!touched) {
      if (leaves(call_, item_)) return;
      std::memset(sum, 0, dim_ * sizeof(float));
    }
    if (call_.joins) {
      read_row(call_.out_type, call_.result, at, query_, dim_);
      for (int64_t d = 0; d < dim_; ++d) sum[d] += query_[d];
    }
    write_row(call_.out_type, call_.result, at, sum, dim_);
  }

  static constexpr int64_t kWeights = KeySums<Mode>::kWeights;

  const Call& call_;
  const Item& item_;
  int64_t dim_, ld_;
  Operand<Mode> keys_, values_;
  Source<T> sources_[2];
  ColumnsOf<Mode> columns_;
  Recent* recent_ = nullptr;
  KeySums<Mode> sums_;
  Turned<Mode> queries_, upstream_;
  Chunk *chunks_, *chunk_ = nullptr;  // the one at hand, of two
  Word *query_rows_, *upstream_rows_, *weight_rows_ = nullptr, *slope_rows_ = nullptr, *slope_columns_ = nullptr;
  float *scores_, *slopes_, *dq_, *dq_before_, *rows_, *query_;
  float reference_[kRows], lse_[kRows], delta_[kRows];  // lse above the reference, which is 0 unless the call has exact sums of rows
};

}  // namespace farlight::FARLIGHT_NS

// Forward: softmax over the keys of a tile, chunk by chunk, rows in lanes; then single pairs, and what other parts and pieces
// have found, row by row.
#pragma once

#include <math.h>

#include "points.h"
#include "rows_ahead.h"
#include "scores.h"

namespace farlight::FARLIGHT_NS {

template <class Mode>
class Forward {
  using T = typename Mode::T;
  using Word = typename Mode::Op::Word;

 public:
  using Session = typename Mode::Session;
  static constexpr int kKeptRows = parts_of<Mode> > 1 ? 1 : 0;  // kinds of rows kept with the columns: K

  Forward(const Call& call, const Item& item, Arena& arena)
      : call_(call),
        item_(item),
        dim_(call.dim),
        ld_(rounded(call.dim, 16)),
        keys_({call.k, item.batch, kv_head()}, dim_, call.plan->n_k),
        values_({call.v, item.batch, kv_head()}, dim_, call.plan->n_k),
        columns_(values_.source(), &keys_.source(), kKeptRows, dim_, item.batch * call.kv_heads + kv_head()),
        queries_(dim_) {
    columns_.reserve(arena);
    recent_ = arena.take<Recent>(1);
    chunks_ = arena.take<Chunk>(2);
    keys_.reserve(arena, true, false);
    values_.reserve(arena, false, !in_tiles<Mode>);
    queries_.reserve(arena);
    scores_ = arena.take<float>(kKeys * kRows);
    weights_ = parts_of<Mode> > 1 ? arena.take<Word>(parts_of<Mode> * kWeights) : reinterpret_cast<Word*>(scores_);
    sum_ = arena.take<float>(rounded(dim_, 16) * kRows);
    rows_ = arena.take<float>(kRows * ld_);
    query_ = arena.take<float>(ld_);
  }

  void run(int first_row, const Item* next) {
    const Tile tile(*call_.plan, item_, first_row);
    const Dropped dropped(call_.dropout, *call_.plan, tile);
    const Source<T> q(call_.q, item_.batch, item_.head);
    const auto [before, factor] = scale_of<Mode>(call_.scale);
    RowsAhead rows_ahead(*call_.plan, Lines::of_row<T>(dim_));
    const Turn turn{&item_, first_row};
    rows_ahead.add(turn, results(), call_.out_type == Type::f32 ? 4 : 2);
    if (in_tiles<Mode>) rows_ahead.some(kRows);
    rows_ahead.add(turn.after(*call_.plan, next), call_.q, sizeof(T));
    PointsAhead<T> points(tile, keys_.source(), values_.source(), dim_);
    queries_.fetch(q, tile, before);
    const int lanes = static_cast<int>(rounded(tile.count, kV * W));
    for (int g = 0; g < kRows; g += W) {
      store(top_ + g, all(kNothing));
      store(total_ + g, all(0.0f));
      store(shrink_ + g, all(1.0f));
    }
    bool fresh = true;
    Walk walk(tile, chunk_of<Mode>, group_of<Mode>);
    bool more = walk.next(chunks_[0]);
    for (int which = 0; more; which ^= 1) {
      chunk_ = chunks_ + which;
      more = walk.next(chunks_[which ^ 1]);
      Ahead<Mode> ahead(more ? chunks_ + (which ^ 1) : nullptr, keys_, values_, columns_, points, recent_, dim_);
      if constexpr (in_tiles<Mode>) {
        take_tiles(ahead, dropped, factor, lanes, fresh);
        rows_ahead.some(kRows / 4);
      } else {
        take(ahead, rows_ahead, dropped, factor, lanes, fresh);
      }
      fresh = false;
    }
    if (fresh) {
      for (int s = 0; s < tile.count; ++s) std::memset(rows_ + s * ld_, 0, ld_ * sizeof(float));
    } else {
      turn_out(sum_, dim_, rows_, ld_);
    }
    if (tile.any_points()) add_points(tile, q, dropped);
    finish(tile, dropped.inverse());
  }

 private:
  int64_t kv_head() const { return item_.head / (call_.heads / call_.kv_heads); }

  Rows results() const { return {call_.result, call_.heads * call_.plan->n_q * dim_, call_.plan->n_q * dim_, dim_}; }

  // One chunk: its scores, their weights, and the values with these.
  FARLIGHT_INLINE void take(Ahead<Mode>& ahead, RowsAhead& rows_ahead, const Dropped& dropped, float factor, int lanes, bool fresh) {
    float top[kRows];
    keys_.fetch_rows(*chunk_);
    score<Mode, true>(*chunk_, keys_, queries_, lanes, scores_, top, [&](int block) {
      const Lines* lines = ahead.lines(block);
      return lines ? lines : rows_ahead.lines();
    });
    for (int g = 0; !scaled_first<Mode> && g < lanes; g += W) store(top + g, mul(load(top + g), all(factor)));
    const bool shrinks = raise(top, lanes, fresh);
    weigh(dropped, all(scale_large(factor, lanes)), lanes);
    add_values(lanes, fresh, shrinks);
  }

  // The same where products are made of tiles.
  FARLIGHT_INLINE void take_tiles(Ahead<Mode>& ahead, const Dropped& dropped, float factor, int lanes, bool fresh) {
#if defined(FARLIGHT_ISA_AMX)
    const int groups = columns_.fetch(*chunk_);
    score_tiles(*chunk_, keys_, columns_, 0, queries_, scores_, ahead);
    F sums[kRows / W];
    if (kSlack == 0.0f || fresh || weigh_tiles(dropped, factor, lanes, sums)) {
      float top[kRows];
      largest_of(*chunk_, scores_, factor, lanes, top);
      if (raise(top, lanes, fresh)) shrink_sums();
      weigh_tiles(dropped, scale_large(factor, lanes), lanes, sums);
    }
    for (int g = 0; g < lanes; g += W) store(total_ + g, add(load(total_ + g), sums[g / W]));
    add_across_groups<parts_of<Mode>>(sum_, columns_.groups, columns_.part(), weights_, kWeights, groups, dim_, fresh, [&] { ahead.some(); });
#else
    (void)ahead, (void)dropped, (void)factor, (void)lanes, (void)fresh;
#endif
  }

  // A row whose largest score rose by more than this gets a new reference. Float weights may exceed 1 until then, harmlessly.
  // Those that are rounded to bfloat16 may not: numbers just below 1 are rounded half as far as those above, so a reference that
  // is the largest score itself costs a tenth less of the rounding that is seen in the results.
  static constexpr float kSlack = in_pairs<Mode> && parts_of<Mode> == 1 ? 0.0f : 8.0f;

  // Whether sums must shrink for that, by shrink_; totals have.
  bool raise(const float* top, int lanes, bool fresh) {
    bool shrinks = false;
    for (int g = 0; g < lanes; g += W) {
      const F old = load(top_ + g), now = load(top + g);
      const uint32_t risen = greater(now, add(old, all(kSlack)));
      store(shrink_ + g, all(1.0f));
      if (!risen) continue;
      const F reference = choose(risen, now, old);
      store(top_ + g, reference);
      if (fresh) continue;
      const F shrink = power2<5>(sub(old, reference));
      store(shrink_ + g, shrink);
      store(total_ + g, mul(load(total_ + g), shrink));
      shrinks = true;
    }
    return shrinks;
  }

  // What the chunk's scores are still to be multiplied by. Where a reference is large they are multiplied here.
  float scale_large(float factor, int lanes) {
    if constexpr (scaled_first<Mode>) return factor;
    uint32_t large = 0;
    for (int g = 0; g < lanes; g += W) {
      const F top = load(top_ + g);
      large |= greater(top, all(kLargeReference)) | (greater(all(-kLargeReference), top) & greater(top, all(kNothing)));
    }
    if (!large) return factor;
    scale_scores(scores_, chunk_->blocks * kM, factor);
    return 1.0f;
  }

  void shrink_sums() {
    for (int64_t d = 0; d < dim_; ++d)
      for (int g = 0; g < kRows; g += W) store(sum_ + d * kRows + g, mul(load(sum_ + d * kRows + g), load(shrink_ + g)));
  }

#if defined(FARLIGHT_ISA_AMX)
  // The weights of a block where products are made of tiles: scores come as they are, neither scaled nor masked, and keys that
  // only fill up the last group are masked as others are. Their sum; `most` grows to the largest power.
  FARLIGHT_INLINE F weigh_block(int block, int g, [[maybe_unused]] F factor, F reference, const Dropped& dropped, F& most) {
    const Chunk& c = *chunk_;
    const int first = block * kM;
    F w[kM];
    FARLIGHT_UNROLL
    for (int i = 0; i < kM; ++i) {
      const F x = load(scores_ + (first + i) * kRows + g);
      w[i] = sub(scaled_first<Mode> ? x : mul(x, factor), reference);
    }
    if (c.masked[block])
      for (int i = 0; i < kM; ++i) w[i] = choose(c.seen[first + i] >> g, w[i], all(kUnseen));
    if (kSlack > 0.0f) most = max(largest(w), most);
    FARLIGHT_UNROLL
    for (int i = 0; i < kM; ++i) w[i] = power2<Mode::degree>(w[i]);
    const F sum = add(add(add(w[0], w[1]), add(w[2], w[3])), add(add(w[4], w[5]), add(w[6], w[7])));
    if (dropped.on())
      for (int i = 0; i < kM; ++i) w[i] = choose(dropped.kept(c.key[first + i], g), w[i], all(0.0f));
    FARLIGHT_UNROLL
    for (int i = 0; i < kM; i += 2) store_paired<parts_of<Mode>>(w[i], w[i + 1], weights_ + (first + i) / 2 * kRows + g, kWeights);
    return sum;
  }

  // As `weigh`, with the references that there are and into `sums`; true where a row needs a new one, and then all is to be done
  // again. Where that is rare, looking for the largest score on the way costs less than looking first.
  bool weigh_tiles(const Dropped& dropped, float factor, int lanes, F* sums) {
    uint32_t risen = 0;
    for (int g = 0; g < lanes; g += W) {
      const F reference = load(top_ + g);
      F sum = all(0.0f), most = all(kUnseen);
      for (int block = 0; block < chunk_->blocks; ++block) sum = add(sum, weigh_block(block, g, all(factor), reference, dropped, most));
      sums[g / W] = sum;
      risen |= greater(most, all(kSlack));
    }
    return risen != 0;
  }
#endif

  // Scores to weights; their sums; what dropout leaves, as operands of the second product.
  void weigh(const Dropped& dropped, F factor, int lanes) {
    const Spans& spans = chunk_->spans;
    for (const Span* span = spans.span; span < spans.span + spans.count; ++span)
      for_lanes(span->halves, lanes, [&]<int V>(int g) { weigh_span<V>(*span, g, factor, dropped); });
  }

  // Vectors of neighbouring lanes together: one has to wait for itself.
  template <int V>
  FARLIGHT_INLINE void weigh_span(const Span& span, int g, [[maybe_unused]] F factor, const Dropped& dropped) {
    F reference[V], total[V];  // of this span, for the reason given at across_block
    FARLIGHT_UNROLL
    for (int v = 0; v < V; ++v) {
      reference[v] = load(top_ + g + v * W);
      total[v] = all(0.0f);
    }
    const auto weight = [&](int i, int v) {
      const F x = load(scores_ + i * kRows + g + v * W);
      const F w = power2<Mode::degree>(scaled_first<Mode> ? sub(x, reference[v]) : fma(x, factor, sub(all(0.0f), reference[v])));
      total[v] = add(total[v], w);
      return dropped.on() ? choose(dropped.kept(chunk_->key[i], g + v * W), w, all(0.0f)) : w;
    };
    for (int i = span.first; i < span.last; i += Mode::Op::per) {
      FARLIGHT_UNROLL
      for (int v = 0; v < V; ++v) {
        const F w = weight(i, v);
        if constexpr (in_pairs<Mode>) {
#if defined(FARLIGHT_PAIRS)
          store_i(weights_ + i / 2 * kRows + g + v * W, paired(w, i + 1 < span.last ? weight(i + 1, v) : all(0.0f)));
#endif
        } else {
          store(scores_ + i * kRows + g + v * W, w);
        }
      }
    }
    FARLIGHT_UNROLL
    for (int v = 0; v < V; ++v) store(total_ + g + v * W, add(load(total_ + g + v * W), total[v]));
  }

  // O^T += V^T P^T. Sums shrink on the way, if all rows see all that the chunk has.
  void add_values(int lanes, bool fresh, bool shrinks) {
    values_.fetch_columns(*chunk_, columns_);
    const Spans& spans = chunk_->spans;
    const bool on_the_way = spans.count == 1 && spans.span[0].halves == kBoth;
    if (shrinks && !on_the_way) shrink_sums();
    add_across<typename Mode::Op>(sum_, values_.across, weights_, spans, dim_, lanes, fresh, shrinks && on_the_way ? shrink_ : nullptr);
  }

  void add_points(const Tile& tile, const Source<T>& q, const Dropped& dropped) {
    PointSoftmax<T> softmax(tile, q, keys_.source(), values_.source(), dim_, call_.scale * kLog2E, dropped,
                            {top_, total_, rows_, ld_, query_});
    for (int i = 0; i < tile.piece->layer_count; ++i)
      if (tile.has_points(tile.piece->layers[i])) softmax.take(tile.piece->layers[i]);
  }

  void finish(const Tile& tile, float inverse) {
    const PieceView& piece = *tile.piece;
    if (piece.slot[item_.entry] < 0) {
      for (int s = 0; s < tile.count; ++s) write(tile.row[s], top_[s], total_[s], rows_ + s * ld_, inverse);
      return;
    }
    float* at = partial(item_.entry) + tile.skip * (dim_ + 2);
    for (int s = 0; s < tile.count; ++s, at += dim_ + 2) {
      at[0] = top_[s];
      at[1] = total_[s];
      std::memcpy(at + 2, rows_ + s * ld_, dim_ * sizeof(float));
    }
  }

  float* partial(int64_t entry) const {
    const PieceView& piece = call_.plan->pieces[item_.piece];
    const int64_t slot = call_.partial_base[item_.piece] + (item_.batch * call_.heads + item_.head) * piece.slots + piece.slot[entry];
    return call_.partial + slot * call_.plan->tile * (dim_ + 2);
  }

 public:
  // Joins the parts of a tile that was split, in their order. Called by whoever finished last.
  void join_parts() {
    const PieceView& piece = call_.plan->pieces[item_.piece];
    const int64_t first = item_.entry - piece.part[item_.entry];
    const int parts = piece.parts[item_.entry];
    const float inverse = call_.dropout.on ? call_.dropout.inverse : 1.0f;
    for (int skip = 0; skip < piece.count[item_.entry]; skip += kRows) {
      const Tile tile(*call_.plan, item_, skip);
      for (int s = 0; s < tile.count; ++s) {
        float top = kNothing, total = 0.0f;
        float* row = rows_ + s * ld_;
        std::memset(row, 0, ld_ * sizeof(float));
        for (int part = 0; part < parts; ++part) {
          const float* at = partial(first + part) + (skip + s) * (dim_ + 2);
          if (at[1] == 0.0f) continue;
          const float reference = at[0] > top ? at[0] : top;
          const float mine = exp2f(top - reference), its = exp2f(at[0] - reference);
          total = total * mine + at[1] * its;
          for (int64_t d = 0; d < dim_; ++d) row[d] = row[d] * mine + at[2 + d] * its;
          top = reference;
        }
        write(tile.row[s], top, total, row, inverse);
      }
    }
  }

 private:
  void write(int64_t row, float top, float total, float* sum, float inverse) {
    const int64_t at = (item_.batch * call_.heads + item_.head) * call_.plan->n_q + row;
    if (total == 0.0f) {
      if (leaves(call_, item_)) return;
      std::memset(sum, 0, dim_ * sizeof(float));
      write_row(call_.out_type, call_.result, at * dim_, sum, dim_);
      call_.lse[at] = -INFINITY;
      return;
    }
    float factor = inverse / total;
    RowSum* const before = call_.row_sums ? call_.row_sums + at : nullptr;
    if (call_.joins && before->total != 0.0f) {
      const float larger = before->top > top ? before->top : top;
      const float its = before->total * exp2f(before->top - larger), mine = total * exp2f(top - larger), both = its + mine;
      factor *= mine / both;
      read_row(call_.out_type, call_.result, at * dim_, query_, dim_);
      for (int64_t d = 0; d < dim_; ++d) sum[d] = sum[d] * factor + query_[d] * (its / both);
      factor = 1.0f;
      top = larger;
      total = both;
    }
    if (before) *before = {top, total};
    call_.lse[at] = top * kLn2 + logf(total);
    write_row(call_.out_type, call_.result, at * dim_, sum, dim_, factor);
  }

  static constexpr int64_t kWeights = kKeys / 2 * kRows;  // words from one part of all weights to the next

  const Call& call_;
  const Item& item_;
  int64_t dim_, ld_;
  Operand<Mode> keys_, values_;
  ColumnsOf<Mode> columns_;
  Recent* recent_ = nullptr;
  Turned<Mode> queries_;
  Chunk *chunks_, *chunk_ = nullptr;  // the one at hand, of two
  // Weights lie where their scores did, if there is room for them: the first cache has room for little else.
  Word* weights_ = nullptr;
  float *scores_, *sum_, *rows_, *query_;
  alignas(64) float top_[kRows];
  alignas(64) float total_[kRows];
  alignas(64) float shrink_[kRows];
};

}  // namespace farlight::FARLIGHT_NS

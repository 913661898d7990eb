#include "choose_until.h"

#include <bit>
#include <vector>

namespace farlight {

// Memory of one thread. Rows of a group are numbered from 0; a list's rows are consecutive.
struct UntilProven::Scratch {
  std::vector<Row> rows;
  std::vector<float> queries;  // (kScoreRows, 2 dim): operands of bound products
  std::vector<float> signed_queries;  // (kScoreRows, dim): operands of key products
  std::vector<float> bounds;   // (kRowSlots, ld): exponents, then weights 2^(exponent - largest)
  std::vector<float> weights, total;
  std::vector<float> keys, key_scores, one_key;  // [dim][kPanel]; (kRowSlots, kPanel); dim
  float slack[kRowSlots], largest[kRowSlots];
  double left_out[kRowSlots], seen[kRowSlots], unresolved[kRowSlots];
  std::vector<Candidate> candidates;
  std::vector<int32_t> chosen;
};

// Candidates in order; only a prefix is sorted, which grows as later places are read.
class UntilProven::Order {
 public:
  explicit Order(std::vector<Candidate>& candidates) : candidates_(candidates) {}
  int64_t size() const { return static_cast<int64_t>(candidates_.size()); }
  int64_t block(int64_t place) {
    while (place >= sorted_) {
      const int64_t end = std::min(size(), sorted_ + std::max<int64_t>(64, sorted_));
      const auto begin = candidates_.begin();
      if (end < size()) std::nth_element(begin + sorted_, begin + end - 1, candidates_.end());
      std::sort(begin + sorted_, begin + end);
      sorted_ = end;
    }
    return candidates_[place].block;
  }

 private:
  std::vector<Candidate>& candidates_;
  int64_t sorted_ = 0;
};

void UntilProven::run(int64_t b, int64_t h, int64_t item, Lists& to) const {
  thread_local Scratch s;
  s.queries.resize(kScoreRows * summaries_.dim());
  s.signed_queries.resize(kScoreRows * p_.dim);
  s.bounds.resize(kRowSlots * ld_);
  s.weights.resize(ld_);
  s.keys.resize(p_.dim * kPanel);
  s.key_scores.resize(kRowSlots * kPanel);
  s.one_key.resize(p_.dim);
  const int64_t first_list = item * lists_per_item(), end = std::min(first_list + lists_per_item(), num_lists_);
  s.rows.clear();
  std::vector<int64_t> first_of = {0};
  for (int64_t u = first_list; u < end; ++u) {
    for (int64_t head = first_head(h); head < first_head(h) + choosing_heads(); ++head)
      for (int64_t r = first_row(u); r < last_row(u); ++r)
        if (real(b, r)) s.rows.push_back({head, r});
    first_of.push_back(static_cast<int64_t>(s.rows.size()));
  }
  const int64_t num_rows = static_cast<int64_t>(s.rows.size());
  const bool together = num_rows <= kScoreRows;  // else a single list, whose rows come kScoreRows at a time, twice
  if (together) score(s, b, h, s.rows.data(), num_rows, scored(end - 1));
  for (int64_t u = first_list; u < end; ++u) {
    const int64_t first = first_of[u - first_list], count = first_of[u - first_list + 1] - first, width = scored(u);
    const Row* rows = s.rows.data() + first;
    const int32_t* sizes = summaries_.sizes(p_, b);
    s.total.assign(width, 0.0f);
    for (int64_t r = 0; r < count; r += kScoreRows) {
      const int64_t some = std::min(kScoreRows, count - r);
      if (!together) score(s, b, h, rows + r, some, width);
      weigh(s, b, u, together ? first : 0, some);
      for (int64_t c = 0; c < width; ++c) s.total[c] += s.weights[c];
    }
    s.candidates.clear();
    for (int64_t c = 0; c < width; ++c)
      if (sizes[c] > 0) s.candidates.push_back({s.total[c], static_cast<int32_t>(c)});
    Order order(s.candidates);
    int64_t needed = 0;
    for (int64_t r = 0; r < count; r += kScoreRows) {
      const int64_t some = std::min(kScoreRows, count - r);
      if (!together) {
        score(s, b, h, rows + r, some, width);
        weigh(s, b, u, 0, some);
      }
      needed = std::max(needed, count_needed(s, b, h, u, order, rows + r, together ? first : 0, some));
    }
    blocks_of(s.candidates.data(), needed, s.chosen);
    append_list(b, u, count > 0, s.chosen.data(), needed, to);
  }
}

// Products of the group's rows with the bounds of the first `width` blocks.
void UntilProven::score(Scratch& s, int64_t b, int64_t h, const Row* rows, int64_t count, int64_t width) const {
  const int64_t dim = p_.dim;
  for (int64_t r = 0; r < count; ++r) {
    float* q = s.queries.data() + r * 2 * dim;
    s.slack[r] = bounds_.read(b, rows[r].head, rows[r].row, q);
    for (int64_t d = 0; d < dim; ++d) s.signed_queries[r * dim + d] = q[d] + q[dim + d];
  }
  const float* row[kRowSlots];
  for (int64_t r = 0; r < kRowSlots; ++r) row[r] = s.queries.data() + (r < count ? r : 0) * 2 * dim;
  if (width && count)
    kernels_.block_scores(row, count, summaries_.panels_of(p_, b, kv_head(h)), (width + kPanel - 1) / kPanel, 2 * dim,
                          s.bounds.data(), ld_);
}

// Turns the products of rows [first, first + count) into weights, and adds the rows' shares into s.weights.
void UntilProven::weigh(Scratch& s, int64_t b, int64_t u, int64_t first, int64_t count) const {
  if (scored(u))
    kernels_.pool_softmax(s.bounds.data() + first * ld_, count, ld_, scored(u), bounds_.factor(), summaries_.log_sizes(p_, b),
                          s.weights.data(), s.largest + first);
}

// How many candidates, in order, prove the rows [first, first + count) of the group.
int64_t UntilProven::count_needed(Scratch& s, int64_t b, int64_t h, int64_t u, Order& order, const Row* rows, int64_t first,
                                  int64_t count) const {
  if (!order.size() || !count) return 0;
  const int64_t width = scored(u);
  for (int64_t r = first; r < first + count; ++r) {
    s.left_out[r] = s.seen[r] = 0.0;
    for (int64_t c = 0; c < width; ++c) s.left_out[r] += static_cast<double>(s.bounds[r * ld_ + c]);
    // Rounding of the sum and of the differences in double, and weights that have underflowed.
    s.unresolved[r] = 1e-12 * s.left_out[r] + static_cast<double>(p_.n_k) * 0x1p-110;
  }
  const auto is_proven = [&](int64_t r) {
    // 2 slack: of bounds and of scores; 2e-5: of exp2 and of float32 sums of kPanel weights.
    const double error = std::exp2(2.0 * static_cast<double>(s.slack[r])) * (1.0 + 2e-5);
    return (s.left_out[r] + s.unresolved[r]) * error <= allowed_ * s.seen[r];
  };
  see_forced_keys(s, b, h, u, rows, first, count);
  uint32_t open = 0;  // a bit for each row without proof
  for (int64_t r = 0; r < count; ++r) open |= is_proven(first + r) ? 0 : 1u << r;
  int64_t place = 0, within = 0;  // the next key: of the block at this place, the key at this offset
  while (open && place < order.size()) {
    // Keys of the next blocks fill a panel.
    struct Segment {
      int64_t block, lo, hi;
      bool ends_block;
    };
    std::vector<Segment> segments;
    std::fill(s.keys.begin(), s.keys.end(), 0.0f);
    for (int64_t lane = 0; lane < kPanel && place + static_cast<int64_t>(segments.size()) < order.size();) {
      const int64_t block = order.block(place + static_cast<int64_t>(segments.size()));
      const int64_t key = block * p_.block + within, end = std::min((block + 1) * p_.block, p_.n_k);
      const int64_t taken = std::min(end - key, kPanel - lane);
      for (int64_t i = 0; i < taken; ++i) pack_key(s, b, h, key + i, lane + i);
      segments.push_back({block, lane, lane + taken, key + taken == end});
      if (!segments.back().ends_block) {
        within += taken;
        break;
      }
      within = 0;
      lane += taken;
    }
    score_keys(s, first, count);
    for (const Segment& segment : segments) {
      float counts[kPanel] = {};
      const int64_t key = (segment.ends_block ? std::min((segment.block + 1) * p_.block, p_.n_k)
                                              : segment.block * p_.block + within) - segment.hi;
      for (int64_t lane = segment.lo; lane < segment.hi; ++lane) counts[lane] = real_key(b, key + lane) ? 1.0f : 0.0f;
      for (uint32_t rest = open; rest; rest &= rest - 1) {
        const int64_t i = std::countr_zero(rest), r = first + i;
        s.seen[r] += static_cast<double>(
            kernels_.weighted_exponentials(s.key_scores.data() + i * kPanel, counts, 1, bounds_.factor(), -s.largest[r]));
        if (!segment.ends_block) continue;
        s.left_out[r] = std::max(0.0, s.left_out[r] - static_cast<double>(s.bounds[r * ld_ + segment.block]));
        if (is_proven(r)) open &= ~(1u << i);
      }
      if (segment.ends_block) ++place;
      if (!open) break;
    }
  }
  return place;
}

// The keys of the forced blocks, up to each row's own position.
void UntilProven::see_forced_keys(Scratch& s, int64_t b, int64_t h, int64_t u, const Row* rows, int64_t first,
                                  int64_t count) const {
  const int64_t end = std::min(end_of_forced(u) * p_.block, p_.n_k);
  for (int64_t lo = scored(u) * p_.block; lo < end; lo += kPanel) {
    const int64_t keys = std::min<int64_t>(kPanel, end - lo);
    std::fill(s.keys.begin(), s.keys.end(), 0.0f);
    for (int64_t i = 0; i < keys; ++i) pack_key(s, b, h, lo + i, i);
    score_keys(s, first, count);
    for (int64_t i = 0; i < count; ++i) {
      float counts[kPanel] = {};
      const int64_t visible = std::min(keys, p_.offset + rows[i].row + 1 - lo);
      for (int64_t lane = 0; lane < visible; ++lane) counts[lane] = real_key(b, lo + lane) ? 1.0f : 0.0f;
      s.seen[first + i] += static_cast<double>(kernels_.weighted_exponentials(s.key_scores.data() + i * kPanel, counts, 1,
                                                                              bounds_.factor(), -s.largest[first + i]));
    }
  }
}

// Products of the rows [first, first + count) with the packed keys.
void UntilProven::score_keys(Scratch& s, int64_t first, int64_t count) const {
  const float* row[kRowSlots];
  for (int64_t r = 0; r < kRowSlots; ++r) row[r] = s.signed_queries.data() + (first + (r < count ? r : 0)) * p_.dim;
  kernels_.block_scores(row, count, s.keys.data(), 1, p_.dim, s.key_scores.data(), kPanel);
}

// Writes a key into a lane of the panel.
void UntilProven::pack_key(Scratch& s, int64_t b, int64_t h, int64_t key, int64_t lane) const {
  read_row(p_.type, p_.k, b, kv_head(h), key, p_.dim, s.one_key.data());
  for (int64_t d = 0; d < p_.dim; ++d) s.keys[d * kPanel + lane] = s.one_key[d];
}

}  // namespace farlight

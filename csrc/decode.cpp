// The native side of a KV cache (decoder.h).
#include "decoder.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "dispatch.h"

namespace farlight {

namespace {

constexpr int64_t kForever = int64_t{1} << 62;  // FOREVER of farlight/patterns/liveness.py
constexpr double kLog2E = 1.44269504088896340736;

// Queries of one call seen through one store: bytes per slot for each query of each row, and the list of slots that any of a
// row's queries sees.
struct RowVisibility {
  const uint8_t* bytes = nullptr;     // (n_q, stride)
  const int32_t* slots = nullptr;     // null: all slots in use
  int64_t count = 0;
  bool every_query_sees_all = true;  // of the listed slots
};

}  // namespace

// Memory of one call, reused by the thread.
struct Decoder::Work {
  DecodeSchedule schedule;
  std::vector<RowVisibility> visibility;
  std::vector<std::vector<uint8_t>> bytes;
  std::vector<std::vector<int32_t>> lists;
  std::vector<uint8_t> stack;
  size_t used_bytes = 0, used_lists = 0;

  static Work& of_thread() {
    thread_local Work work;
    work.schedule.clear();
    work.used_bytes = work.used_lists = 0;
    return work;
  }
  std::vector<uint8_t>& new_bytes(int64_t size) {
    if (used_bytes == bytes.size()) bytes.emplace_back();
    bytes[used_bytes].resize(size);
    return bytes[used_bytes++];
  }
  std::vector<int32_t>& new_list() {
    if (used_lists == lists.size()) lists.emplace_back();
    lists[used_lists].clear();
    return lists[used_lists++];
  }
};

const char* TokenTensor::row(int64_t b, int64_t h, int64_t i) const {
  return static_cast<const char*>(view.data) + (b * view.batch + h * view.head + i * view.row) * bytes_of(type);
}

Decoder::Decoder(int64_t batch, int64_t kv_heads, int64_t dim, KeyType type, int64_t keep_back)
    : batch_(batch), kv_heads_(kv_heads), dim_(dim), keep_back_(keep_back), type_(type) {}

// ---- append -----------------------------------------------------------------------------------------------------------------
namespace {

constexpr int64_t kGeneral = -2, kNotStored = -1;

}  // namespace

// The slot for the token, kNotStored where no query sees it, kGeneral where the append is more than one write.
Decoder::TokenSlot Decoder::slot_for_token(const DecodeStore& store, int64_t position) const {
  if (store.rows != 1 || position < store.rule_start || position >= store.rule_stop) return {kGeneral, 0};
  const int64_t oldest = std::max<int64_t>(0, position - keep_back_);  // the first query that keys are kept for
  const bool is_stored = store.rule_last_use[position - store.rule_start] >= oldest;
  const int64_t count = store.count(0);
  TokenSlot slot{kGeneral, store.state[1]};
  if (store.state[1] >= oldest) {
    if (!is_stored) return {kNotStored, 0};
    if (count < store.capacity) slot.slot = count;
  } else if (is_stored) {
    const ExpiredSlots expired = farlight::kernels().decode->expired(store.last_use, count, oldest);
    if (expired.count == 1) slot = {expired.slot, std::min(expired.least, kForever)};
  }
  return slot.slot < 0 || store.pages[slot.slot >> store.page_shift].shared ? TokenSlot{kGeneral, 0} : slot;
}

void Decoder::write_token(DecodeStore& store, TokenSlot to, int64_t position) const {
  const int64_t last_use = store.rule_last_use[position - store.rule_start], slot = to.slot;
  const uint8_t gapless = store.rule_gapless[position - store.rule_start];
  const bool is_new = slot == store.count(0);
  if (!is_new) store.state[3] = std::max(store.state[3], store.last_use[slot] + 1);
  store.state[2] += (is_new ? 1 : store.gapless[slot]) - gapless;
  store.position[slot] = position, store.gapless[slot] = gapless, store.last_use[slot] = last_use;
  store.state[0] += is_new;
  store.state[1] = std::min(to.least_of_others, last_use);
}

void Decoder::copy_token(const DecodeStore& store, int64_t slot, const TokenTensor& k, const TokenTensor& v) const {
  const DecodeKernels& kernels = *farlight::kernels().decode;
  const KeyPage& page = store.pages[slot >> store.page_shift];
  const int64_t in_page = slot & ((int64_t{1} << store.page_shift) - 1), heads = static_cast<int64_t>(store.kv_heads.size());
  const int64_t bytes = dim_ * bytes_of(type_);
  float row[kMaxDim];
  const auto copy = [&](const TokenTensor& from, int64_t b, int64_t h, char* to, float* scale) {
    if (from.type == type_) {
      std::memcpy(to, from.row(b, h, 0), static_cast<size_t>(bytes));
      return;
    }
    kernels.widen(from.type, from.row(b, h, 0), dim_, 1.0f, row);
    const float s = kernels.narrow(type_, row, dim_, to);
    if (scale) *scale = s;
  };
  for (int64_t b = 0; b < batch_; ++b)
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t at = (b * heads + h) * page.capacity + in_page;
      copy(k, b, store.kv_heads[h], page.k + at * bytes, page.k_scale ? page.k_scale + at : nullptr);
      copy(v, b, store.kv_heads[h], page.v + at * bytes, page.v_scale ? page.v_scale + at : nullptr);
    }
}

bool Decoder::append(const TokenTensor& k, const TokenTensor& v, int64_t position) {
  thread_local std::vector<TokenSlot> slots;
  slots.clear();
  if (!has_capacity_for_summaries(position)) return false;
  for (const DecodeStore& store : stores_) {
    slots.push_back(slot_for_token(store, position));
    if (slots.back().slot == kGeneral) return false;
  }
  for (size_t s = 0; s < stores_.size(); ++s) {
    if (slots[s].slot == kNotStored) {
      int64_t& horizon = stores_[s].state[3];
      horizon = std::max(horizon, stores_[s].rule_last_use[position - stores_[s].rule_start] + 1);
      continue;
    }
    copy_token(stores_[s], slots[s].slot, k, v);
    write_token(stores_[s], slots[s], position);
  }
  summarize(position);
  return true;
}

// ---- attention --------------------------------------------------------------------------------------------------------------
bool Decoder::sees_every_slot(const DecodeStore& store, const DecodeQueries& queries) const {
  if (queries.n_q != 1) return false;
  for (int64_t row = 0; row < store.rows; ++row) {
    const int64_t i = queries.position(row, 0);
    if (store.state[4 * row + 2] != 0 || store.state[4 * row + 1] < i || i < 0) return false;
  }
  return true;
}

// Fills work.visibility with one entry for each row of the store's slot tables.
void Decoder::evaluate(const DecodeStore& store, const DecodeQueries& queries, Work& work) const {
  const DecodeKernels& kernels = *farlight::kernels().decode;
  const VisibilityProgram program{store.program.data(), static_cast<int64_t>(store.program.size()), store.program_depth};
  const bool all = sees_every_slot(store, queries);
  work.visibility.clear();
  for (int64_t row = 0; row < store.rows; ++row) {
    const int64_t count = store.count(row), n_q = queries.n_q;
    if (all) {
      work.visibility.push_back({nullptr, nullptr, count, true});
      continue;
    }
    std::vector<uint8_t>& bytes = work.new_bytes(n_q * count);
    if (static_cast<int64_t>(work.stack.size()) < program.depth * count) work.stack.resize(program.depth * count);
    for (int64_t i = 0; i < n_q; ++i) {
      const int64_t position = queries.position(row, i);
      uint8_t* to = bytes.data() + i * count;
      if (position < 0) std::memset(to, 0, static_cast<size_t>(count));
      else kernels.visible(program, store.position + row * store.capacity, count, position, to, work.stack.data());
    }
    std::vector<int32_t>& list = work.new_list();
    bool equal = true;
    if (n_q == 1) {
      list.resize(count + kListSlack);
      list.resize(kernels.list_nonzero(bytes.data(), count, list.data()));
    }
    for (int64_t s = 0; n_q > 1 && s < count; ++s) {
      uint8_t any = 0, every = 1;
      for (int64_t i = 0; i < n_q; ++i) any |= bytes[i * count + s], every &= bytes[i * count + s];
      if (any) list.push_back(static_cast<int32_t>(s));
      equal &= any == every;
    }
    const bool whole = static_cast<int64_t>(list.size()) == count;
    work.visibility.push_back({bytes.data(), whole ? nullptr : list.data(), static_cast<int64_t>(list.size()), equal});
  }
}

void Decoder::add_units(const DecodeStore& store, const DecodeQueries& queries, Work& work) const {
  const int64_t heads = static_cast<int64_t>(store.kv_heads.size()), group = queries.heads / kv_heads_;
  for (int64_t b = 0; b < batch_; ++b) {
    const int64_t row = store.rows > 1 ? b : 0;
    const RowVisibility& seen = work.visibility[row];
    int64_t masks = -1;
    if (!seen.every_query_sees_all) {
      masks = static_cast<int64_t>(work.schedule.masks.size());
      for (int64_t g = 0; g < group; ++g)
        for (int64_t i = 0; i < queries.n_q; ++i) work.schedule.masks.push_back(seen.bytes + i * store.count(row));
    }
    for (int64_t h = 0; h < heads; ++h)
      work.schedule.units.push_back({store.pages.data(), store.page_shift, type_, b * heads + h,
                                     (b * queries.heads + store.kv_heads[h] * group) * queries.n_q, group * queries.n_q,
                                     seen.slots, 0, seen.count, masks, store.position + row * store.capacity});
  }
}

void Decoder::run(const DecodeQueries& queries, Work& work) const {
  const DecodeKernels& kernels = *farlight::kernels().decode;
  DecodeSchedule& schedule = work.schedule;
  schedule.queries.resize(batch_ * queries.heads * queries.n_q * dim_);
  float* to = schedule.queries.data();
  schedule.factor = static_cast<float>(static_cast<double>(queries.scale) * kLog2E);
  for (int64_t b = 0; b < batch_; ++b)
    for (int64_t h = 0; h < queries.heads; ++h)
      for (int64_t i = 0; i < queries.n_q; ++i, to += dim_)
        kernels.widen(queries.q.type, queries.q.row(b, h, i), dim_, 1.0f, to);
  set_terms(queries, schedule);
  schedule.run(kernels, dim_, {queries.q.type, queries.out, queries.lse}, queries.threads);
}

// The schedule's terms of every row (b, h, i).
void Decoder::set_terms(const DecodeQueries& queries, DecodeSchedule& schedule) const {
  const CallTerms& terms = queries.terms;
  schedule.terms = {terms.cap, terms.first, terms.length};
  schedule.row_terms.clear(), schedule.sinks.clear();
  for (int64_t b = 0; b < batch_; ++b)
    for (int64_t h = 0; h < queries.heads; ++h)
      for (int64_t i = 0; i < queries.n_q; ++i) {
        if (terms.on())
          schedule.row_terms.push_back({queries.position(b, i), terms.slopes ? terms.slopes[h] : 0.0f,
                                        terms.distance ? terms.distance + h * terms.length : nullptr,
                                        terms.key_bias ? terms.key_bias + b * terms.key_batch + h * terms.key_head : nullptr});
        if (terms.sinks) schedule.sinks.push_back(terms.sinks[h]);
      }
}

bool Decoder::attend(const DecodeQueries& queries) const {
  Work& work = Work::of_thread();
  for (const DecodeStore& store : stores_)
    if (store.program.empty() && !sees_every_slot(store, queries)) return false;
  for (const DecodeStore& store : stores_) {
    evaluate(store, queries, work);
    add_units(store, queries, work);
  }
  run(queries, work);
  return true;
}

void Decoder::attend_masked(const DecodeQueries& queries, const std::vector<SlotMask>& masks) const {
  Work& work = Work::of_thread();
  for (size_t s = 0; s < stores_.size(); ++s) add_masked_units(stores_[s], queries, masks[s], work);
  run(queries, work);
}

void Decoder::add_masked_units(const DecodeStore& store, const DecodeQueries& queries, const SlotMask& mask, Work& work) const {
  const int64_t heads = static_cast<int64_t>(store.kv_heads.size()), group = queries.heads / kv_heads_;
  for (int64_t b = 0; b < batch_; ++b)
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t count = store.count(store.rows > 1 ? b : 0), masks = static_cast<int64_t>(work.schedule.masks.size());
      for (int64_t g = 0; g < group; ++g)
        for (int64_t i = 0; i < queries.n_q; ++i)
          work.schedule.masks.push_back(mask.data + b * mask.batch + (h * group + g) * mask.head + i * mask.query);
      std::vector<int32_t>& list = work.new_list();
      const uint8_t* const* rows = work.schedule.masks.data() + masks;
      for (int64_t s = 0; s < count; ++s) {
        uint8_t any = 0;
        for (int64_t r = 0; r < group * queries.n_q; ++r) any |= rows[r][s];
        if (any) list.push_back(static_cast<int32_t>(s));
      }
      work.schedule.units.push_back({store.pages.data(), store.page_shift, type_, b * heads + h,
                                     (b * queries.heads + store.kv_heads[h] * group) * queries.n_q, group * queries.n_q,
                                     list.data(), 0, static_cast<int64_t>(list.size()), masks,
                                     store.position + (store.rows > 1 ? b : 0) * store.capacity});
    }
}

}  // namespace farlight

// Vector clocks: what barriers and their like tell the threads of each other (see clocks.h).
#include "clocks.h"

#include <algorithm>

namespace convgen {
namespace host {

Clocks::Clocks(size_t threads, size_t agents)
    : threads_(threads + agents),
      clock_(threads_),
      base_(threads_),
      rows_(threads_),
      row_interval_(threads_) {}

void Clocks::start_block() {
  interval_ = 1;
  std::fill(base_.begin(), base_.end(), 0u);
  std::fill(clock_.begin(), clock_.end(), 1u);
  std::fill(row_interval_.begin(), row_interval_.end(), 0u);
  synchronizations_.clear();
}

void Clocks::barrier() {
  base_ = clock_;
  for (uint32_t& clock : clock_) ++clock;
  ++interval_;
}

void Clocks::barrier(const std::vector<Fiber*>& fibers) {
  std::vector<uint32_t> joined(base_);
  for (const Fiber* fiber : fibers) {
    const size_t t = static_cast<size_t>(fiber->rank);
    if (row_interval_[t] == interval_) {
      for (size_t u = 0; u < threads_; ++u) joined[u] = std::max(joined[u], rows_[t][u]);
    }
  }
  for (const Fiber* fiber : fibers) {
    const size_t t = static_cast<size_t>(fiber->rank);
    joined[t] = clock_[t];
  }
  for (const Fiber* fiber : fibers) {
    const size_t t = static_cast<size_t>(fiber->rank);
    rows_[t] = joined;
    row_interval_[t] = interval_;
    ++clock_[t];
  }
}

void Clocks::release(const Fiber& fiber, const void* object) {
  const size_t t = static_cast<size_t>(fiber.rank);
  std::vector<uint32_t>& pending = synchronizations_[object].pending;
  pending.resize(threads_);
  for (size_t u = 0; u < threads_; ++u) pending[u] = std::max(pending[u], known(t, u));
  pending[t] = clock_[t]++;
}

void Clocks::complete(const void* object) {
  Synchronization& sync = synchronizations_[object];
  sync.completed.swap(sync.pending);
  sync.pending.assign(threads_, 0);
}

void Clocks::acquire(const Fiber& fiber, const void* object) {
  const size_t t = static_cast<size_t>(fiber.rank);
  const std::vector<uint32_t>& completed = synchronizations_[object].completed;
  if (completed.empty()) return;
  refresh_row(t);
  for (size_t u = 0; u < threads_; ++u) rows_[t][u] = std::max(rows_[t][u], completed[u]);
}

void Clocks::learn_common(const std::vector<Fiber*>& fibers, size_t agent) {
  std::vector<uint32_t>& row = rows_[agent];
  row.assign(threads_, UINT32_MAX);
  for (const Fiber* fiber : fibers) {
    const size_t t = static_cast<size_t>(fiber->rank);
    refresh_row(t);
    const uint32_t own = rows_[t][t];
    rows_[t][t] = clock_[t];  // a thread knows what it did
    for (size_t u = 0; u < threads_; ++u) row[u] = std::min(row[u], rows_[t][u]);
    rows_[t][t] = own;
  }
  row_interval_[agent] = interval_;
}

void Clocks::tell(size_t agent, const std::vector<Fiber*>& fibers) {
  for (const Fiber* fiber : fibers) {
    const size_t t = static_cast<size_t>(fiber->rank);
    refresh_row(t);
    rows_[t][agent] = clock_[agent];
  }
  ++clock_[agent];
}

void Clocks::refresh_row(size_t t) {
  if (row_interval_[t] == interval_) return;
  rows_[t] = base_;
  row_interval_[t] = interval_;
}

uint32_t Clocks::known(size_t t, size_t u) const {
  return row_interval_[t] == interval_ ? std::max(base_[u], rows_[t][u]) : base_[u];
}

}  // namespace host
}  // namespace convgen

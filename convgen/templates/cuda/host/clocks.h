// What the threads of a block know of each other: whether a barrier lies between two accesses.
//
// Each thread has a clock, which barriers advance. A thread t knows that another thread u has
// passed the barrier at the end of u's interval c if c <= known(t, u): then whatever u did in that
// interval happened before. This is the algorithm of FastTrack (Flanagan and Freund, "FastTrack:
// efficient and precise dynamic race detection", 2009). A barrier of the whole block is remembered
// once for all threads (base_), one of a few threads in the rows of those (rows_).
//
// Besides the threads there are agents, numbered behind them: what a warp's products read, they read
// at an agent's time, which the warp learns when it has waited for them.
#pragma once

#include <map>
#include <vector>

#include "state.h"

namespace convgen {
namespace host {

class Clocks {
 public:
  Clocks(size_t threads, size_t agents);

  void start_block();

  // What these mean is said beside their namesakes of check::, in state.h.
  void barrier();
  void barrier(const std::vector<Fiber*>& fibers);
  void release(const Fiber& fiber, const void* object);
  void complete(const void* object);
  void acquire(const Fiber& fiber, const void* object);
  // The agent knows what all of these threads know.
  void learn_common(const std::vector<Fiber*>& fibers, size_t agent);
  // They know what the agent has done.
  void tell(size_t agent, const std::vector<Fiber*>& fibers);
  void forget(const void* object) { synchronizations_.erase(object); }

  // A thread's clock, and the number of the interval between barriers of the whole block.
  uint32_t now(size_t t) const { return clock_[t]; }
  uint32_t interval() const { return interval_; }

  // Whether what u did at a time of its clock happened before what t does now.
  bool before(uint16_t u, uint32_t clock, size_t t) const {
    if (u == t || clock <= base_[u]) return true;
    return row_interval_[t] == interval_ && clock <= rows_[t][u];
  }

 private:
  // What t knows of u's clock.
  uint32_t known(size_t t, size_t u) const;
  void refresh_row(size_t t);

  const size_t threads_;  // and agents
  uint32_t interval_ = 1;
  std::vector<uint32_t> clock_, base_;
  std::vector<std::vector<uint32_t>> rows_;
  std::vector<uint32_t> row_interval_;  // a row counts only in the interval of its barrier
  // Of named barriers and mbarriers: what is known to all that arrived in a phase.
  struct Synchronization {
    std::vector<uint32_t> pending, completed;
  };
  std::map<const void*, Synchronization> synchronizations_;
};

}  // namespace host
}  // namespace convgen

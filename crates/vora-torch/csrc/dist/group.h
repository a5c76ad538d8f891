// A group of processes that wait for each other, and for nothing longer than until somebody tells them to stop.
#pragma once

#define USE_DISTRIBUTED
#define USE_C10D_GLOO

#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <list>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>

// What is being waited for. A collective cannot be called back once it has begun, so nobody waits for it itself, but for a
// future of ours, which `abort` ends as well.
class Waits : public std::enable_shared_from_this<Waits> {
 public:
  using Future = c10::ivalue::Future;

  c10::intrusive_ptr<Future> watch(const c10::intrusive_ptr<Future>& inner) {
    auto outer = c10::make_intrusive<Future>(inner->elementType(), inner->devices());
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!reason_.empty()) throw std::runtime_error(reason_);
      pending_.push_back({outer, std::chrono::steady_clock::now()});
    }
    inner->addCallback([self = shared_from_this(), outer](Future& inner) {
      std::lock_guard<std::mutex> lock(self->mutex_);
      self->pending_.remove_if([&](const Pending& pending) { return pending.future == outer; });
      if (outer->completed()) return;
      if (inner.hasError()) {
        outer->setError(inner.exception_ptr());
      } else {
        outer->markCompleted(inner.value(), inner.storages());
      }
    });
    return outer;
  }

  void wait(const c10::intrusive_ptr<c10d::Work>& work) {
    auto future = watch(work->getFuture());
    future->wait();
    future->value();  // throws where there is none
  }

  void abort(const std::string& reason) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (reason_.empty()) reason_ = reason;
    for (auto& pending : pending_) {
      if (!pending.future->completed()) pending.future->setError(std::make_exception_ptr(std::runtime_error(reason_)));
    }
    pending_.clear();
  }

  // For how long the oldest of them has been waited for, in seconds; 0 where there is none.
  double oldest() {
    std::lock_guard<std::mutex> lock(mutex_);
    if (pending_.empty()) return 0.0;
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - pending_.front().since).count();
  }

  bool is_aborted() {
    std::lock_guard<std::mutex> lock(mutex_);
    return !reason_.empty();
  }

 private:
  struct Pending {
    c10::intrusive_ptr<Future> future;
    std::chrono::steady_clock::time_point since;
  };
  std::mutex mutex_;
  std::list<Pending> pending_;
  std::string reason_;
};

struct Group {
  c10::intrusive_ptr<c10d::ProcessGroup> group;
  std::shared_ptr<Waits> waits;
  std::shared_ptr<std::atomic<uint64_t>> reduced;  // bytes of gradients that were handed to all-reduce
};

// A group of processes that wait for each other, and for nothing longer than until somebody tells them to stop.
#pragma once

#define USE_C10D_GLOO

#include "nccl.h"

#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <list>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

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

  void wait(const c10::intrusive_ptr<c10d::Work>& work, c10::Device device) {
    auto future = watch(work->getFuture());
    future->wait();
    future->value();  // throws where there is none
    queued(device);
  }

  // A GPU is what waits for NCCL, and a process for its GPU: what is queued there by now is being waited for.
  void queued(c10::Device device) {
    if (device.is_cpu()) return;
    c10::Event event(device.type());
    event.record(c10::impl::VirtualGuardImpl(device.type()).getStream(device));
    std::lock_guard<std::mutex> lock(mutex_);
    drop_reached();
    on_device_.emplace_back(std::move(event), std::chrono::steady_clock::now());
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
    if (reason_.empty()) drop_reached();
    auto now = std::chrono::steady_clock::now(), since = now;
    if (!pending_.empty()) since = std::min(since, pending_.front().since);
    if (!on_device_.empty()) since = std::min(since, on_device_.front().second);
    return std::chrono::duration<double>(now - since).count();
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
  void drop_reached() {
    while (!on_device_.empty() && on_device_.front().first.query()) on_device_.pop_front();
  }

  std::mutex mutex_;
  std::list<Pending> pending_;
  std::list<std::pair<c10::Event, std::chrono::steady_clock::time_point>> on_device_;
  std::string reason_;
};

struct Group {
  c10::intrusive_ptr<c10d::ProcessGroup> group;
  std::shared_ptr<Waits> waits;
  std::shared_ptr<std::atomic<uint64_t>> reduced;  // bytes of gradients that were handed to all-reduce
  c10::intrusive_ptr<c10d::Backend> nccl;          // where it is attached
};

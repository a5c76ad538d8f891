// Processes that work together, over libtorch's c10d: a store that all of them reach, and collectives over Gloo, and
// over NCCL where it is attached.
#include "group.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include <cstring>

#include "../guard.h"

using c10d::Store;
using StorePtr = c10::intrusive_ptr<Store>;

namespace {

// NCCL says on its last lines what is wrong.
std::runtime_error on_one_line(std::string text) {
  std::replace(text.begin(), text.end(), '\n', ' ');
  return std::runtime_error(text);
}

at::Tensor* bytes(const std::vector<uint8_t>& value) {
  auto tensor = at::empty({static_cast<int64_t>(value.size())}, at::kByte);
  if (!value.empty()) std::memcpy(tensor.data_ptr(), value.data(), value.size());
  return new at::Tensor(tensor);
}

}  // namespace

extern "C" {

// A client of the store at that place, which this process keeps as well where `is_server`; keys begin with `vora`.
StorePtr* vora_store_new(const char* host, uint16_t port, int is_server, int64_t timeout_ms) {
  return guard<StorePtr*>(nullptr, [&] {
    c10d::TCPStoreOptions options;
    options.port = port;
    options.isServer = is_server != 0;
    options.waitWorkers = false;
    options.timeout = std::chrono::milliseconds(timeout_ms);
    StorePtr store = c10::make_intrusive<c10d::TCPStore>(host, options);
    return new StorePtr(c10::make_intrusive<c10d::PrefixStore>("vora", store));
  });
}

// The same store, where keys begin with `prefix` as well.
StorePtr* vora_store_within(StorePtr* store, const char* prefix) {
  return guard<StorePtr*>(nullptr,
                          [&] { return new StorePtr(c10::make_intrusive<c10d::PrefixStore>(prefix, *store)); });
}

void vora_store_free(StorePtr* store) { delete store; }

int vora_store_set(StorePtr* store, const char* key, const uint8_t* data, size_t len) {
  return guard(-1, [&] {
    (*store)->set(key, std::vector<uint8_t>(data, data + len));
    return 0;
  });
}

// 1 where the key is there, 0 where it is not.
int vora_store_has(StorePtr* store, const char* key) {
  return guard(-1, [&] { return (*store)->check({key}) ? 1 : 0; });
}

// The bytes under a key; it is waited for.
at::Tensor* vora_store_get(StorePtr* store, const char* key) {
  return guard<at::Tensor*>(nullptr, [&] { return bytes((*store)->get(key)); });
}

// Puts `desired` where `expected` is, "" for nothing; gives what is there then.
at::Tensor* vora_store_swap(StorePtr* store, const char* key, const char* expected, const char* desired) {
  return guard<at::Tensor*>(nullptr, [&] {
    auto all = [](const char* text) { return std::vector<uint8_t>(text, text + std::strlen(text)); };
    return bytes((*store)->compareSet(key, all(expected), all(desired)));
  });
}

// A group over Gloo. `interface` and `host` choose the network device, both empty: that of the machine's name.
Group* vora_group_new(StorePtr* store, int rank, int world_size, const char* interface, const char* host,
                      int64_t timeout_ms) {
  return guard<Group*>(nullptr, [&] {
    using c10d::ProcessGroupGloo;
    auto options = ProcessGroupGloo::Options::create(std::chrono::milliseconds(timeout_ms));
    options->devices.push_back(*interface != 0 ? ProcessGroupGloo::createDeviceForInterface(interface)
                               : *host != 0    ? ProcessGroupGloo::createDeviceForHostname(host)
                                               : ProcessGroupGloo::createDefaultDevice());
    StorePtr for_gloo = c10::make_intrusive<c10d::PrefixStore>("gloo", *store);
    auto gloo = c10::make_intrusive<ProcessGroupGloo>(for_gloo, rank, world_size, options);
    auto group = c10::make_intrusive<c10d::ProcessGroup>(*store, rank, world_size);
    group->setDefaultBackend(c10d::ProcessGroup::BackendType::GLOO);
    for (auto device : {c10::kCPU, c10::kCUDA}) {
      group->setBackend(device, c10d::ProcessGroup::BackendType::GLOO, c10::intrusive_ptr<c10d::Backend>(gloo));
    }
    return new Group{group, std::make_shared<Waits>(), std::make_shared<std::atomic<uint64_t>>(0), {}};
  });
}

// Threads of a group that was told to stop may never come back from the network: it is left to the end of the process.
void vora_group_free(Group* group) {
  if (group->waits->is_aborted()) return;
  if (group->nccl) {
    guard(-1, [&] {
      group->nccl->shutdown();
      return 0;
    });
  }
  delete group;
}

// Has tensors on GPUs go through NCCL, by the library's `attach`; nothing is sent yet.
int vora_group_attach_nccl(Group* group, StorePtr* store, AttachNccl* attach, int device, int64_t timeout_ms) {
  return guard(-1, [&] {
    if (const char* error = attach(group->group.get(), store, device, timeout_ms)) throw on_one_line(error);
    group->nccl = group->group->getBackend(c10::kCUDA);
    return 0;
  });
}

// Makes NCCL's connections, which all processes do at once.
int vora_group_connect_nccl(Group* group, int device) {
  return guard(-1, [&] {
    try {
      group->nccl->eagerConnectSingleDevice(c10::Device(c10::kCUDA, static_cast<c10::DeviceIndex>(device)));
    } catch (const c10::Error& e) {
      throw on_one_line(e.what_without_backtrace());
    }
    return 0;
  });
}

// 1 where NCCL has found its connections broken.
int vora_group_is_broken(Group* group) {
  return guard(0, [&] { return group->nccl && group->nccl->getError() != c10d::ErrorType::SUCCESS ? 1 : 0; });
}

// `op` is c10d's `ReduceOp`.
int vora_group_all_reduce(Group* group, at::Tensor* tensor, int op) {
  return guard(-1, [&] {
    std::vector<at::Tensor> tensors{*tensor};
    c10d::AllreduceOptions options;
    options.reduceOp = c10d::ReduceOp(static_cast<c10d::ReduceOp::RedOpType>(op));
    group->waits->wait(group->group->allreduce(tensors, options), tensor->device());
    return 0;
  });
}

int vora_group_broadcast(Group* group, at::Tensor* tensor, int root) {
  return guard(-1, [&] {
    std::vector<at::Tensor> tensors{*tensor};
    c10d::BroadcastOptions options;
    options.rootRank = root;
    group->waits->wait(group->group->broadcast(tensors, options), tensor->device());
    return 0;
  });
}

// Of each of `n` tensors `[..]` of every rank -> `[world_size, ..]`, into `gathered`; they are on their way side by side.
int vora_group_all_gather(Group* group, at::Tensor** tensors, size_t n, at::Tensor** gathered) {
  return guard(-1, [&] {
    std::vector<at::Tensor> all;
    std::vector<c10::intrusive_ptr<c10d::Work>> works;
    for (size_t i = 0; i < n; i++) {
      auto shape = tensors[i]->sizes().vec();
      shape.insert(shape.begin(), group->group->getSize());
      all.push_back(at::empty(shape, tensors[i]->options()));
      auto flat = all.back().view(-1), input = tensors[i]->view(-1);  // side by side: NCCL copies nothing
      works.push_back(group->group->_allgather_base(flat, input));
    }
    for (size_t i = 0; i < n; i++) group->waits->wait(works[i], tensors[i]->device());
    for (size_t i = 0; i < n; i++) gathered[i] = new at::Tensor(all[i]);
    return 0;
  });
}

void vora_group_abort(Group* group, const char* reason) {
  group->waits->abort(reason);
  if (!group->nccl) return;
  guard(-1, [&] {
    group->nccl->abort();  // a GPU that waits goes on, with whatever it has
    return 0;
  });
}

double vora_group_waiting(Group* group) {
  return guard(0.0, [&] { return group->waits->oldest(); });
}

uint64_t vora_group_reduced(Group* group) { return group->reduced->load(); }

}  // extern "C"

// What the library `vora_nccl` exports. It links CUDA, so it stands beside the program, which opens it where there is a GPU.
#pragma once

#define USE_DISTRIBUTED

#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>

// Has `group` send tensors on GPUs through NCCL, which comes together by `store`; this process's are on GPU `device`. Null, or
// what is wrong, until the next call of this thread.
using AttachNccl = const char*(c10d::ProcessGroup* group, const c10::intrusive_ptr<c10d::Store>* store, int device,
                               int64_t timeout_ms);

//! The machine: devices and dtypes by name, threads, memory, the environment that libraries read, and the profiler.

mod available;
mod device;
mod environment;
mod memory;
mod profile;

pub use crate::map::reserved_zeros;
pub use available::available_memory;
#[cfg(target_os = "linux")]
pub(crate) use device::loaded_libtorch;
pub use device::{device, has_bf16, init, kind, name_of, set_threads, synchronize, threads};
pub use environment::{Workload, missing_environment};
pub use memory::{GpuMemory, gpu_memory, machine, memory, peak_memory, process_size, release_freed};
pub use profile::profiled;

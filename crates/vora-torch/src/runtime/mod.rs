//! The machine: devices and dtypes by name, threads, memory.

mod device;
mod memory;

pub use device::{device, has_bf16, init, kind, name_of, set_threads, synchronize};
pub use memory::{GpuMemory, gpu_memory, machine, memory, peak_memory, process_size};

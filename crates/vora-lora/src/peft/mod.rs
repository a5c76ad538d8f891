//! PEFT's adapter folder: its configuration, and the folder in and out.

mod config;
mod folder;
#[cfg(test)]
mod tests;

pub use config::{ADAPTER_TENSORS, BaseModel, PEFT_PREFIX};
pub use folder::{AdapterError, AdapterFolder, save_adapter};

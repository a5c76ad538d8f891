//! Folders that others made, through the crate's public parts.

mod peft;
mod vision_lora;

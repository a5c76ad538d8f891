//! What shows in a process and between several, and layers beside their references.

mod dist;
mod memory;
mod preference;
mod rms_norm;

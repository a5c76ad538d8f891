//! What shows between processes, and layers beside their references.

mod dist;
mod preference;
mod rms_norm;

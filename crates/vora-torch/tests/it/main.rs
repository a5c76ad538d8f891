//! What only shows between processes.

mod dist;

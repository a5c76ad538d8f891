//! `cargo xtask bench ablations`: what vision attention, distillation and the tokens that adapters act on are worth, over
//! several seeds; every training a process of its own, and a finished one is not repeated.

mod picture;
mod table;
mod trainings;
mod variant;

pub use trainings::run;

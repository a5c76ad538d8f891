//! The run file: one YAML file is one run.

pub mod anchor;
pub mod data;
pub mod distill;
pub mod loss;
pub mod model;
pub(crate) mod overrides;
pub(crate) mod run;

pub use overrides::Difference;
pub use run::Strategy;

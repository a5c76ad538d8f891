//! The workspace as its sources declare it: packages, modules, and what a path in the code names.

pub mod resolve;
#[cfg(test)]
pub mod small;
pub mod sources;
pub mod test_code;
pub mod workspace;

//! The workspace as its sources declare it: packages, modules, and what a path in the code names; and the rules of its
//! order, which [`tidy`] tells the faults of.

#![expect(missing_docs, reason = "no package of its own: what a field holds is said where its name does not")]

pub mod resolve;
pub mod small;
pub mod sources;
pub mod test_code;
pub mod tidy;
pub mod workspace;

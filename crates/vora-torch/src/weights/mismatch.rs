//! What of a checkpoint does not fit the model that reads it.

use std::fmt::{self, Display};
use std::path::PathBuf;

use thiserror::Error;

/// How many names of each list a mismatch shows.
const NAMED: usize = 10;

/// What does not fit between a checkpoint and the model that reads it, in one list; shown, the first ten of each list
/// and how many there are.
#[derive(Debug, Error, PartialEq)]
#[non_exhaustive]
pub struct Mismatch {
    /// Where the weights came from.
    pub path: PathBuf,
    /// Names that the model wants and the checkpoint lacks.
    pub missing: Vec<String>,
    /// Names in the checkpoint that the model did not ask for.
    pub unexpected: Vec<String>,
    /// Name, shape found, shape expected.
    pub misshapen: Vec<(String, Vec<i64>, Vec<i64>)>,
}

impl Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} does not fit this model:", self.path.display())?;
        let misshapen: Vec<String> = self
            .misshapen
            .iter()
            .map(|(name, found, expected)| format!("{name} is {found:?}, the model expects {expected:?}"))
            .collect();
        for (what, lines) in
            [("missing   ", &self.missing), ("unexpected", &self.unexpected), ("misshapen ", &misshapen)]
        {
            for line in lines.iter().take(NAMED) {
                write!(f, "\n  {what} {line}")?;
            }
            if lines.len() > NAMED {
                write!(f, "\n  {what} and {} more, {} in all", lines.len() - NAMED, lines.len())?;
            }
        }
        Ok(())
    }
}

//! `cargo xtask check --tidy`: the order of the house, read from the sources alone; nothing is compiled.
//!
//! An *arrow* goes from the file that names a path to the file that defines what the path names. Paths are resolved as
//! rustc does: through `use`, globs, `crate`, `self` and `super`; a re-export is followed to the definition. Paths in
//! macro calls and attributes count, those in code for tests (`#[cfg(test)]`, `#[test]`, `tests/`, `examples/`,
//! `benches/`) do not. What no path names is not seen: a method that another file adds to a type. A path that leads nowhere
//! is told too, so that nothing is overlooked in silence.
//!
//! | rule | a fault is |
//! | --- | --- |
//! | `circles` | a circle of arrows among the files of one room |
//! | `picture` | a crate whose dependencies are not those in `docs/architecture.md`, or that points upward there |
//! | `never` | an arrow between two rooms that must not know each other |
//! | `public_paths` | a public item that has two paths |
//! | `size` | a file above 700 lines of code, a crate above 8,000 lines |

mod arrows;
mod circles;
mod fault;
mod never;
mod picture;
mod public_paths;
mod size;

use std::path::Path;

use anyhow::{Result, bail};

use crate::sources::Sources;
use crate::workspace::Workspace;

/// What was read of the workspace in `root`, in a line.
///
/// # Errors
/// There are faults, all of which are listed, or a source cannot be read.
pub fn run(root: &Path) -> Result<String> {
    let workspace = Workspace::read(root)?;
    let sources = Sources::read(root, &workspace.targets())?;
    let arrows = arrows::all(&sources);
    let mut faults = arrows.lost;
    faults.extend(circles::check(&sources, &arrows.found));
    faults.extend(picture::check(root, &workspace)?);
    faults.extend(never::check(&sources, &arrows.found));
    faults.extend(public_paths::check(&sources));
    faults.extend(size::check(root, &workspace)?);
    if faults.is_empty() {
        return Ok(format!("{} modules, {} arrows, no fault", sources.modules.len(), arrows.found.len()));
    }
    bail!("the house is not tidy: {} faults\n{}", faults.len(), fault::report(&faults).trim_end())
}

//! `block_maps/`: how well the language model's vision tokens matched the teacher, as pictures with their layout.

use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// The folder of a run that maps lie in.
pub const FOLDER: &str = "block_maps";

/// Where everything lies in the PNG file, and the cosines: `step-N.json` beside `step-N.png`.
///
/// Each picture has two rows of cells: the picture and the teacher's blocks, then the student's blocks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Layout {
    /// Width and height of a cell in pixels.
    pub cell: [u32; 2],
    /// Pixels from one cell to the next, rightwards and downwards.
    pub stride: [u32; 2],
    /// The pictures from above to below.
    pub pictures: Vec<PictureLayout>,
}

/// One picture of a [`Layout`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PictureLayout {
    /// What it is called.
    pub name: String,
    /// Mean cosine of student and teacher over its tokens, a block each.
    pub cosines: Vec<f64>,
}

/// The steps after which a run has maps, ascending.
///
/// # Errors
/// Where the folder cannot be listed.
pub fn steps(run: &Path) -> Result<Vec<u64>> {
    let folder = run.join(FOLDER);
    if !folder.exists() {
        return Ok(Vec::new());
    }
    let what = || format!("cannot list {}", folder.display());
    let mut steps = Vec::new();
    for entry in std::fs::read_dir(&folder).with_context(what)? {
        let name = entry.with_context(what)?.file_name();
        let step = name.to_str().and_then(|name| name.strip_prefix("step-")?.strip_suffix(".json"));
        steps.extend(step.and_then(|step| step.parse::<u64>().ok()));
    }
    steps.sort_unstable();
    Ok(steps)
}

impl Layout {
    /// Left edge of a block's cells.
    pub fn column(&self, block: usize) -> u32 {
        (block as u32 + 1) * self.stride[0]
    }

    /// Upper edge of a picture's cells: `part` 0 is the teacher's row, 1 the student's.
    pub fn row(&self, picture: usize, part: u32) -> u32 {
        (2 * picture as u32 + part) * self.stride[1]
    }
}

//! What a Chameleon wrote, taken apart into words and pictures.

use anyhow::{Result, ensure};
use tch::Tensor;
use vora_image::RgbImage;
use vora_model::ImageWriter;

/// A stretch of what was generated.
#[derive(Debug, Clone, PartialEq)]
pub enum Passage {
    /// Tokens of words.
    Text(Vec<i64>),
    /// A picture.
    Image(RgbImage),
}

/// Words and pictures in the order of `ids`, as generated under a [`Constraint`](crate::Constraint); the tokens that
/// begin and end pictures are dropped.
///
/// # Errors
/// Where a picture is not complete, or the model has nothing to draw it with.
pub fn passages(model: &dyn ImageWriter, ids: &[i64]) -> Result<Vec<Passage>> {
    let is_image = |id: &i64| model.image_vocabulary().binary_search(id).is_ok();
    let (rows, cols) = model.drawn_grid();
    let mut passages = Vec::new();
    for run in ids.chunk_by(|a, b| is_image(a) == is_image(b)) {
        if run.first().is_some_and(is_image) {
            let found = run.len() as i64;
            ensure!(found == rows * cols, "a picture has {found} image tokens, it takes {}", rows * cols);
            let pictures = model.draw(&Tensor::from_slice(run).unsqueeze(0))?;
            passages.extend(pictures.into_iter().map(Passage::Image));
        } else {
            let frame = [model.begin_image_id(), model.end_image_id()];
            let words: Vec<i64> = run.iter().copied().filter(|id| !frame.contains(id)).collect();
            if !words.is_empty() {
                passages.push(Passage::Text(words));
            }
        }
    }
    Ok(passages)
}

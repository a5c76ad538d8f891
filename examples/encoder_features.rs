//! What a vision encoder sees in a picture: the features that a language model would get, and how alike its patches
//! are to the one in the middle.
//!
//! ```sh
//! cargo run -p vora-examples --bin encoder_features -- path/to/clip-vit-large-patch14 picture.jpg
//! ```

use std::path::Path;

use anyhow::{Context, Result};
use vora_image::open_image;
use vora_vision::tch::{Device, Kind, Tensor, no_grad};
use vora_vision::{Encoder, FeatureSelection, stack};

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let usage = "usage: encoder_features ENCODER_FOLDER PICTURE";
    let (folder, picture) = (args.next().context(usage)?, args.next().context(usage)?);
    let encoder = Encoder::open(Path::new(&folder), Device::Cpu, Kind::Float)?;
    let pixels = encoder.processor().preprocess(&open_image(Path::new(&picture))?)?;
    let (rows, columns) = encoder.model().grid(pixels.height as i64, pixels.width as i64)?;

    let selection = FeatureSelection::default(); // patches of the last block but one
    let features = no_grad(|| encoder.features(&stack(&[pixels])?, &selection))?.squeeze_dim(0);
    println!("{rows} x {columns} patches of {} numbers", features.size()[1]);

    let middle = features.get(rows / 2 * columns + columns / 2).unsqueeze(0);
    let likeness = Tensor::cosine_similarity(&features, &middle, 1, 1e-8).view([rows, columns]);
    for row in 0..rows {
        let line: String = (0..columns).map(|column| shade(likeness.double_value(&[row, column]))).collect();
        println!("{line}");
    }
    Ok(())
}

/// The darker, the more alike.
fn shade(likeness: f64) -> char {
    const SHADES: [char; 5] = [' ', '░', '▒', '▓', '█'];
    SHADES[(likeness.clamp(0.0, 1.0) * 4.0).round() as usize]
}

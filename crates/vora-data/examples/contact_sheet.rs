//! Writes a sheet of pictures of `scenes`, to look at: `contact_sheet OUT.png [IMAGE_SIZE]`. Training pictures with
//! every ground, colour and shape above, pictures of the split `unseen` below.

use std::env;

use anyhow::{Context, Result};
use image::imageops;
use vora_data::scenes::{Colour, Ground, Scenes, ScenesConfig, Shape, Split};

fn main() -> Result<()> {
    let mut arguments = env::args().skip(1);
    let path = arguments.next().context("usage: contact_sheet OUT.png [IMAGE_SIZE]")?;
    let image_size = arguments.next().map_or(Ok(56), |size| size.parse())?;
    let config = ScenesConfig {
        image_size,
        colours: Colour::ALL.to_vec(),
        shapes: Shape::ALL.to_vec(),
        grounds: vec![Ground::Grey, Ground::Light, Ground::Dark, Ground::Tinted],
        ..ScenesConfig::default()
    };
    let sheet = |split, rows| Ok::<_, anyhow::Error>(Scenes::new(config.clone(), split)?.contact_sheet(10, rows, 2));
    let (train, unseen) = (sheet(Split::Train, 4)?, sheet(Split::Unseen, 2)?);
    let mut both = image::RgbImage::new(train.width(), train.height() + unseen.height());
    imageops::replace(&mut both, &train, 0, 0);
    imageops::replace(&mut both, &unseen, 0, train.height().into());
    both.save(&path).with_context(|| format!("writing {path}"))
}

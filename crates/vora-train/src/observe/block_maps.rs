//! How well the language model's vision tokens match the teacher, as pictures: per block the teacher's features and what
//! the head makes of the decoder's hidden states, in the colours of the teacher's first three principal components.
//!
//! Both are scaled to length 1 first, as the cosine that is learned sees them. Components, centre and range of colours are
//! the teacher's, over all pictures of a map: where the student says the same, it has the same colour.

use std::path::Path;

use anyhow::{Context, Result};
use tch::{Device, Kind, Tensor};
use vora_data::{Sample, collate};
use vora_files::write_bytes;
use vora_image::RgbImage;
use vora_run::block_maps::{FOLDER, Layout, PictureLayout};

use crate::observe::samples::Shown;
use vora_student::{DeviceBatch, Student};

/// Pictures in a map.
const PICTURES: usize = 4;
/// Pixels that a map's side has at least.
const CELL: u32 = 64;
/// Pixels between two maps.
const GAP: u32 = 6;
/// Height of the bar under a student's map: as long as the cosine is large.
const BAR: u32 = 4;

const WHITE: [u8; 3] = [0xff; 3];
const PALE: [u8; 3] = [0xe4, 0xe4, 0xe4];
const DISTILL: [u8; 3] = [0xd9, 0x6c, 0x1e];

/// Some pictures through all blocks.
#[derive(Debug)]
pub struct BlockMaps {
    pictures: Vec<PictureMaps>,
}

/// One picture through all blocks.
#[derive(Debug)]
struct PictureMaps {
    name: String,
    picture: RgbImage,
    blocks: Vec<BlockMap>,
}

/// One picture in one block, a pixel a token.
#[derive(Debug)]
struct BlockMap {
    cosine: f64, // mean over the tokens
    teacher: RgbImage,
    student: RgbImage,
}

impl BlockMaps {
    /// Runs the first pictures that are of one size through student and teacher; none without a teacher or a picture.
    ///
    /// # Errors
    /// Where the pictures do not fit the model or the teacher.
    pub fn measure(student: &Student, shown: &[Shown]) -> Result<Option<Self>> {
        let size = |shown: &&Shown| (shown.picture().height, shown.picture().width);
        let Some(first) = shown.first().as_ref().map(size) else { return Ok(None) };
        let chosen: Vec<&Shown> = shown.iter().filter(|other| size(other) == first).take(PICTURES).collect();
        let samples: Vec<Sample> = chosen.iter().map(|shown| shown.sample.clone()).collect();
        let batch = DeviceBatch::new(&collate(samples, 0), student.device());
        let Some(features) = tch::no_grad(|| student.block_features(&batch))? else { return Ok(None) };

        let patch_size = usize::try_from(student.pictures().patch_size)?;
        let grid = [first.1 / patch_size, first.0 / patch_size].map(|side| side as u32); // columns, rows
        let of_picture = |shown: &&Shown| PictureMaps {
            name: shown.name.clone(),
            picture: shown.seen(&student.pictures().processor),
            blocks: Vec::new(),
        };
        let mut pictures: Vec<PictureMaps> = chosen.iter().map(of_picture).collect();
        for (teacher, student) in &features {
            let [teacher, student] = [teacher, student].map(|f| f.to_device(Device::Cpu).to_kind(Kind::Float));
            let projection = Projection::new(&teacher);
            let colours = Colours::new(&projection.apply(&teacher));
            let images = |features: &Tensor| colours.paint(&projection.apply(features), grid, pictures.len());
            let (teachers, students) = (images(&teacher)?, images(&student)?);
            let cosines = Tensor::cosine_similarity(&teacher, &student, -1, 1e-8).view([pictures.len() as i64, -1]);
            let cosines = Vec::<f64>::try_from(cosines.mean_dim(-1, false, Kind::Double))?;
            for (picture, ((teacher, student), cosine)) in
                pictures.iter_mut().zip(teachers.into_iter().zip(students).zip(cosines))
            {
                picture.blocks.push(BlockMap { cosine, teacher, student });
            }
        }
        Ok(Some(Self { pictures }))
    }

    /// Where [`Self::image`] has what.
    pub fn layout(&self) -> Layout {
        let [columns, rows] = self.grid();
        let scale = CELL.div_ceil(columns.max(rows));
        let cell = [columns * scale, rows * scale];
        let of_picture = |maps: &PictureMaps| PictureLayout {
            name: maps.name.clone(),
            cosines: maps.blocks.iter().map(|block| block.cosine).collect(),
        };
        Layout {
            cell,
            stride: [cell[0] + GAP, cell[1] + BAR + GAP],
            pictures: self.pictures.iter().map(of_picture).collect(),
        }
    }

    /// Tokens of a picture: columns, rows.
    fn grid(&self) -> [u32; 2] {
        let map = self.pictures.iter().flat_map(|maps| &maps.blocks).next();
        map.map_or([1, 1], |block| block.teacher.dimensions().into())
    }

    /// All maps: for each picture a row of the picture and the teacher's blocks, and below it the student's blocks, each
    /// over a bar that is as long as its cosine is large.
    pub fn image(&self) -> RgbImage {
        let layout = self.layout();
        let [width, height] = layout.cell;
        let columns = 1 + self.pictures.iter().map(|maps| maps.blocks.len() as u32).max().unwrap_or(0);
        let size = (columns * layout.stride[0] - GAP, 2 * self.pictures.len() as u32 * layout.stride[1] - GAP);
        let mut image = RgbImage::from_pixel(size.0, size.1, WHITE.into());
        for (row, maps) in self.pictures.iter().enumerate() {
            let (teacher, student) = (layout.row(row, 0), layout.row(row, 1));
            copy(&mut image, &maps.picture, layout.cell, (0, teacher));
            for (block, map) in maps.blocks.iter().enumerate() {
                let left = layout.column(block);
                copy(&mut image, &map.teacher, layout.cell, (left, teacher));
                copy(&mut image, &map.student, layout.cell, (left, student));
                let filled = (map.cosine.clamp(0.0, 1.0) * f64::from(width)).round() as u32;
                for x in 0..width {
                    let colour = if x < filled { DISTILL } else { PALE };
                    (1..BAR).for_each(|y| image.put_pixel(left + x, student + height + y, colour.into()));
                }
            }
        }
        image
    }

    /// Writes `step-N.png` and `step-N.json` into a run's folder of maps.
    ///
    /// # Errors
    /// Where the folder or a file cannot be written.
    pub fn save(&self, run: &Path, step: u64) -> Result<()> {
        let folder = run.join(FOLDER);
        std::fs::create_dir_all(&folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
        let path = folder.join(format!("step-{step}.png"));
        self.image().save(&path).with_context(|| format!("cannot write {}", path.display()))?;
        write_bytes(&path.with_extension("json"), serde_json::to_string_pretty(&self.layout())?.as_bytes())
    }
}

/// Puts a picture into a cell, enlarged or made smaller without mixing pixels.
fn copy(image: &mut RgbImage, from: &RgbImage, [width, height]: [u32; 2], (left, top): (u32, u32)) {
    for y in 0..height {
        for x in 0..width {
            let pixel = from.get_pixel(x * from.width() / width, y * from.height() / height);
            image.put_pixel(left + x, top + y, *pixel);
        }
    }
}

/// Features scaled to length 1, in the coordinates of their first three principal components.
struct Projection {
    mean: Tensor,  // [hidden]
    basis: Tensor, // [hidden, components]
}

impl Projection {
    /// Of `features` `[tokens, hidden]`: the eigenvectors of their covariance with the largest eigenvalues, each with its
    /// largest entry positive. Fewer than three where `hidden` is.
    fn new(features: &Tensor) -> Self {
        let unit = unit(features);
        let mean = unit.mean_dim([0i64].as_slice(), false, Kind::Double);
        let centred = &unit - &mean;
        let (_, vectors) = centred.transpose(0, 1).matmul(&centred).linalg_eigh("L"); // ascending
        let components = vectors.size()[1].min(3);
        let basis = vectors.narrow(1, vectors.size()[1] - components, components).flip([1i64]);
        let largest = basis.gather(0, &basis.abs().argmax(0, true), false); // [1, components]
        Self { mean, basis: basis * largest.sign() }
    }

    /// `[tokens, hidden]` -> `[tokens, components]`, in f64
    fn apply(&self, features: &Tensor) -> Tensor {
        (unit(features) - &self.mean).matmul(&self.basis)
    }
}

/// `x / |x|`, over the last dimension, in f64.
fn unit(features: &Tensor) -> Tensor {
    let features = features.to_kind(Kind::Double);
    &features / features.norm_scalaropt_dim(2, [-1i64], true).clamp_min(1e-8)
}

/// The range of each component, that becomes a channel of colour.
struct Colours {
    low: Tensor,   // [components]
    range: Tensor, // [components]
}

impl Colours {
    /// The range that `projected` `[tokens, components]` covers.
    fn new(projected: &Tensor) -> Self {
        let low = projected.amin([0i64].as_slice(), false);
        let range = (projected.amax([0i64].as_slice(), false) - &low).clamp_min(1e-12);
        Self { low, range }
    }

    /// `projected` `[pictures * rows * columns, components]` as pictures, a pixel a token; what lies outside the range has
    /// the colour at its end, and a component that is not there is half.
    fn paint(&self, projected: &Tensor, [columns, rows]: [u32; 2], pictures: usize) -> Result<Vec<RgbImage>> {
        let bytes = ((projected - &self.low) / &self.range * 255.0).round().clamp(0.0, 255.0);
        let missing = (3 - bytes.size()[1]).max(0);
        let bytes = bytes.pad([0, missing], "constant", 128.0).to_kind(Kind::Uint8).contiguous();
        let bytes = Vec::<u8>::try_from(bytes.flatten(0, 1))?;
        let length = 3 * (columns * rows) as usize;
        let image = |i: usize| {
            let bytes = bytes.get(i * length..(i + 1) * length)?;
            RgbImage::from_raw(columns, rows, bytes.to_vec())
        };
        (0..pictures).map(|i| image(i).context("a picture's tokens are not those of its grid")).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn projections_are_the_references() {
        let golden = fixtures::open("block_maps");
        for case in ["wide", "flat"] {
            let of = |key: &str| &golden[&*format!("{case}.{key}")];
            let projection = Projection::new(of("teacher"));
            for who in ["teacher", "student"] {
                let projected = projection.apply(of(who)).to_kind(Kind::Float);
                fixtures::assert_close_to(&projected, of(&format!("{who}_projected")), 1e-6);
            }
            let cosine = (unit(of("teacher")) * unit(of("student"))).sum_dim_intlist([-1i64].as_slice(), false, None);
            fixtures::assert_close_to(&cosine.to_kind(Kind::Float), of("cosine"), 1e-6);
        }
    }

    #[test]
    fn the_teachers_range_is_the_range_of_colours() {
        let teacher = Tensor::from_slice2(&[[0.0f64, -1.0], [1.0, 3.0]]);
        let colours = Colours::new(&teacher);
        let bytes = |projected: &Tensor| colours.paint(projected, [1, 2], 1).unwrap()[0].as_raw().clone();
        assert_eq!(bytes(&teacher), [0, 0, 128, 255, 255, 128]);
        assert_eq!(bytes(&Tensor::from_slice2(&[[2.0f64, 0.0], [-1.0, 3.0]])), [255, 64, 128, 0, 255, 128]);
        assert!(colours.paint(&teacher, [2, 2], 1).is_err());
    }

    #[test]
    fn cells_lie_where_the_layout_says() {
        let pixel = |colour: [u8; 3]| RgbImage::from_pixel(2, 2, colour.into());
        let block =
            |shade: u8, cosine| BlockMap { cosine, teacher: pixel([shade, 0, 0]), student: pixel([0, shade, 0]) };
        let picture = |name: &str, shade: u8| PictureMaps {
            name: name.to_owned(),
            picture: pixel([shade; 3]),
            blocks: vec![block(shade, 0.5), block(shade + 1, -1.0)],
        };
        let maps = BlockMaps { pictures: vec![picture("a", 10), picture("b", 20)] };
        let folder = tempfile::tempdir().unwrap();
        assert!(vora_run::block_maps::steps(folder.path()).unwrap().is_empty());
        maps.save(folder.path(), 10).unwrap();
        maps.save(folder.path(), 3).unwrap();
        assert_eq!(vora_run::block_maps::steps(folder.path()).unwrap(), [3, 10]);
        let path = folder.path().join("block_maps/step-3.png");
        let image = vora_image::open_image(&path).unwrap();
        let layout: Layout = serde_json::from_slice(&std::fs::read(path.with_extension("json")).unwrap()).unwrap();
        assert_eq!((layout.cell, layout.pictures[1].cosines.as_slice()), ([64, 64], [0.5, -1.0].as_slice()));
        let at = |x: u32, y: u32| image.get_pixel(x, y).0;
        assert_eq!(at(0, layout.row(1, 0)), [20; 3]);
        assert_eq!(at(layout.column(1), layout.row(1, 0)), [21, 0, 0]);
        assert_eq!(at(layout.column(0) + 63, layout.row(0, 1) + 63), [0, 10, 0]);
        let bar = layout.row(0, 1) + 64 + 1;
        assert_eq!([31, 32].map(|x| at(layout.column(0) + x, bar)), [DISTILL, PALE]);
        assert_eq!(at(layout.column(1), bar), PALE);
    }
}

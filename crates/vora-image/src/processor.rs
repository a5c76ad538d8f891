//! RGB picture -> normalised pixels, exactly as Hugging Face's image processors compute them.

use anyhow::{Result, bail, ensure};
use image::RgbImage;
use vora_files::tell_once;

use crate::budget::TokenBudget;
use crate::decode::MAX_PIXELS;
use crate::pixels::Pixels;
use crate::resample::{Backend, Resample, resize};

/// Mean and standard deviation of ImageNet's channels, which DINOv2 and many others were trained with.
pub const IMAGENET_DEFAULT: ([f64; 3], [f64; 3]) = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]);
/// Mean and standard deviation that CLIP was trained with, and AIMv2.
pub const OPENAI_CLIP: ([f64; 3], [f64; 3]) =
    ([0.481_454_66, 0.457_827_5, 0.408_210_73], [0.268_629_54, 0.261_302_58, 0.275_777_11]);
/// Bytes at -1 to 1, which ViT and SigLIP were trained with.
pub const IMAGENET_STANDARD: ([f64; 3], [f64; 3]) = ([0.5; 3], [0.5; 3]);

/// The size that a picture is resampled to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Size {
    /// The shorter side becomes this long, the other follows.
    ShortestEdge(u32),
    /// Both sides, whatever the picture's aspect.
    Exact {
        /// Rows.
        height: u32,
        /// Columns.
        width: u32,
    },
    /// Whole patches, as many as may be, at about the picture's own aspect (SigLIP 2's NaFlex).
    Patches {
        /// Side of a patch, in pixels.
        patch_size: u32,
        /// The most there may be.
        max_num_patches: u32,
    },
    /// The picture's own aspect at the largest size of no more than so many tokens, each a square of `patch_size *
    /// pooling_kernel_size` pixels a side (Gemma 4).
    SoftTokens {
        /// Side of a patch, in pixels.
        patch_size: u32,
        /// Patches along the side of a token.
        pooling_kernel_size: u32,
        /// The most tokens there may be.
        max_soft_tokens: u32,
    },
    /// Whole patches within a budget, at the picture's own aspect.
    Budget(TokenBudget),
}

/// What becomes of a picture that is not square.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Aspect {
    /// Bars of this colour make it a square, then it is resized: all of it is there, in its own proportions.
    Pad([u8; 3]),
    /// It is resized to a square, whatever its proportions.
    Squash,
    /// Its shorter side is resized, and what lies beyond a square in the middle is cut off.
    Crop,
    /// It keeps its shape, in as many whole patches as a budget holds; a square does so as any other.
    Keep(TokenBudget),
}

/// Pad, resize, crop, rescale and normalise: what a `preprocessor_config.json` describes.
#[derive(Debug, Clone)]
pub struct ImageProcessor {
    pub(crate) backend: Backend,
    pub(crate) size: Option<Size>,
    pub(crate) resample: Resample,
    pub(crate) crop_size: Option<(u32, u32)>, // height, width
    pub(crate) rescale_factor: Option<f64>,
    pub(crate) mean_std: Option<([f64; 3], [f64; 3])>,
    pub(crate) pad: Option<[u8; 3]>, // the colour of the bars that make a square of every picture, before all else
    table: Vec<[f32; 256]>,          // one a channel: the value of each byte
}

impl ImageProcessor {
    /// Every picture becomes `image_size` x `image_size`, whatever its aspect.
    pub fn square(image_size: u32, image_mean: [f64; 3], image_std: [f64; 3], resample: Resample) -> Self {
        let size = Some(Size::Exact { height: image_size, width: image_size });
        Self::new(Backend::default(), size, resample, None, Some(1.0 / 255.0), Some((image_mean, image_std)))
    }

    /// SigLIP 2's own for pictures of any aspect.
    pub fn patches(patch_size: i64, max_num_patches: i64) -> Self {
        let [patch_size, max_num_patches] = [patch_size, max_num_patches].map(|n| u32::try_from(n).unwrap_or(1));
        let size = Some(Size::Patches { patch_size, max_num_patches });
        Self::new(Backend::default(), size, Resample::Bilinear, None, Some(1.0 / 255.0), Some(IMAGENET_STANDARD))
    }

    pub(crate) fn new(
        backend: Backend,
        size: Option<Size>,
        resample: Resample,
        crop_size: Option<(u32, u32)>,
        rescale_factor: Option<f64>,
        mean_std: Option<([f64; 3], [f64; 3])>,
    ) -> Self {
        let table = (0..3).map(|channel| byte_values(backend, rescale_factor, mean_std, channel)).collect();
        Self { backend, size, resample, crop_size, rescale_factor, mean_std, pad: None, table }
    }

    /// The same processor with bars of this colour around pictures that are not square, or without any.
    #[must_use]
    pub(crate) fn with_pad(self, pad: Option<[u8; 3]>) -> Self {
        Self { pad, ..self }
    }

    /// The same processor with another backend's arithmetic.
    #[must_use]
    pub fn with_backend(&self, backend: Backend) -> Self {
        let (rescale_factor, mean_std) = (self.rescale_factor, self.mean_std);
        Self::new(backend, self.size, self.resample, self.crop_size, rescale_factor, mean_std).with_pad(self.pad)
    }

    /// The channels' mean and standard deviation; 0 and 1 where pictures are not normalised.
    pub fn mean_std(&self) -> ([f64; 3], [f64; 3]) {
        self.mean_std.unwrap_or(([0.0; 3], [1.0; 3]))
    }

    /// The colour that normalisation brings nearest to 0, as bars have it in Hugging Face's `LlavaImageProcessor`.
    pub fn mean_color(&self) -> [u8; 3] {
        let factor = self.rescale_factor.unwrap_or(1.0);
        self.mean_std().0.map(|mean| (mean / factor) as u8)
    }

    /// What becomes of a picture that is not square.
    pub fn aspect(&self) -> Aspect {
        match (self.pad, self.size, self.crop_size) {
            (Some(color), ..) => Aspect::Pad(color),
            (None, Some(Size::ShortestEdge(_)), Some(_)) => Aspect::Crop,
            (None, Some(Size::Budget(budget)), _) => Aspect::Keep(budget),
            _ => Aspect::Squash,
        }
    }

    /// The same processor, by channels and sampling, for squares of `image_size` x `image_size`, or for pictures that keep
    /// their shape.
    #[must_use]
    pub fn with_aspect(&self, image_size: u32, aspect: Aspect) -> Self {
        let exact = Size::Exact { height: image_size, width: image_size };
        let (size, crop_size, pad) = match aspect {
            Aspect::Pad(color) => (exact, None, Some(color)),
            Aspect::Squash => (exact, None, None),
            Aspect::Crop => (Size::ShortestEdge(image_size), Some((image_size, image_size)), None),
            Aspect::Keep(budget) => (Size::Budget(budget), None, None),
        };
        let (rescale_factor, mean_std) = (self.rescale_factor, self.mean_std);
        Self::new(self.backend, Some(size), self.resample, crop_size, rescale_factor, mean_std).with_pad(pad)
    }

    /// Side of the square that it takes for one token, in pixels, where it counts them.
    pub fn token_size(&self) -> Option<u32> {
        match self.size {
            Some(Size::Budget(budget)) => Some(budget.patch_size()),
            Some(Size::SoftTokens { patch_size, pooling_kernel_size, .. }) => Some(patch_size * pooling_kernel_size),
            _ => None,
        }
    }

    /// The same processor with another budget of tokens, where pictures keep their shape.
    ///
    /// # Errors
    /// Where they become squares, the budget leaves no picture possible, or it is none that Gemma 4's processor takes.
    pub fn with_max_image_tokens(&self, max_image_tokens: u32) -> Result<Self> {
        let size = match self.size {
            Some(Size::Budget(budget)) => Size::Budget(budget.with_max(max_image_tokens)?),
            Some(Size::SoftTokens { patch_size, pooling_kernel_size, .. }) => {
                soft_token_budget("max_image_tokens", max_image_tokens)?;
                Size::SoftTokens { patch_size, pooling_kernel_size, max_soft_tokens: max_image_tokens }
            }
            _ => bail!(
                "the model's pictures become squares of one size; a budget is for one trained with model.max_image_tokens"
            ),
        };
        Ok(Self { size: Some(size), ..self.clone() })
    }

    /// The height and width of what comes out for a picture of that height and width.
    ///
    /// # Errors
    /// Where the picture's shape fits in no budget ([`TokenBudget::grid`]).
    pub fn output_size(&self, height: u32, width: u32) -> Result<(u32, u32)> {
        let (height, width) = self.padded(height, width);
        self.crop_size.map_or_else(|| self.resized(height, width), Ok)
    }

    /// Pads, resizes, crops (filling up with black where the picture is smaller), rescales and normalises.
    ///
    /// # Errors
    /// Where the picture has no pixels, or resizing would make more than [`MAX_PIXELS`] of them, as for a picture one
    /// pixel wide and very long; and where its shape fits in no budget.
    pub fn preprocess(&self, image: &RgbImage) -> Result<Pixels> {
        let (from_height, from_width) = (image.height(), image.width());
        ensure!(from_height > 0 && from_width > 0, "a picture of {from_width} x {from_height} pixels shows nothing");
        let (padded_height, padded_width) = self.padded(from_height, from_width);
        let (height, width) = self.resized(padded_height, padded_width)?;
        let most = u64::from(width) * u64::from(height.max(padded_height));
        ensure!(
            most <= MAX_PIXELS,
            "a picture of {from_width} x {from_height} pixels would be resized to {width} x {height}, over the limit"
        );
        let from = (from_height, from_width);
        let bytes = match self.pad.filter(|_| from_height != from_width) {
            Some(color) => self.pad_and_resize(image, color, (height, width))?.into(),
            None => resize(image.as_raw(), from, (height, width), self.resample, self.backend)?,
        };
        Ok(self.crop_and_normalise(&bytes, height as usize, width as usize))
    }

    /// The height and width of the square that a picture is put into, its own where it is put into none.
    fn padded(&self, height: u32, width: u32) -> (u32, u32) {
        let side = height.max(width);
        if self.pad.is_some() { (side, side) } else { (height, width) }
    }

    /// A picture in the middle of a square, an odd pixel below it or to its right, and the square resized. The square of
    /// a sliver is far larger than the sliver: it is made some rows at a time, each of which is narrow at once.
    fn pad_and_resize(&self, image: &RgbImage, color: [u8; 3], to: (u32, u32)) -> Result<Vec<u8>> {
        const ROWS: u32 = 64;
        let (width, height) = image.dimensions();
        let side = height.max(width);
        let (above, before) = ((side - height) / 2, (side - width) / 2);
        let line = 3 * side as usize;
        let narrow = |rows: &[u8]| -> Result<Vec<u8>> {
            let num_rows = u32::try_from(rows.len() / line)?;
            Ok(resize(rows, (num_rows, side), (num_rows, to.1), self.resample, self.backend)?.into_owned())
        };
        let empty = color.repeat(side as usize);
        let bar = narrow(&empty)?;
        let mut narrowed = bar.repeat(above as usize); // [side, width of `to`]
        for first in (0..height).step_by(ROWS as usize) {
            let last = (first + ROWS).min(height);
            let mut rows = empty.repeat((last - first) as usize);
            for (row, y) in rows.chunks_exact_mut(line).zip(first..last) {
                let from = &image.as_raw()[3 * y as usize * width as usize..][..3 * width as usize];
                row[3 * before as usize..][..from.len()].copy_from_slice(from);
            }
            narrowed.extend(narrow(&rows)?);
        }
        narrowed.extend(bar.repeat((side - height - above) as usize));
        Ok(resize(&narrowed, (side, to.1), to, self.resample, self.backend)?.into_owned())
    }

    fn resized(&self, height: u32, width: u32) -> Result<(u32, u32)> {
        Ok(match self.size {
            None => (height, width),
            Some(Size::Exact { height, width }) => (height, width),
            Some(Size::ShortestEdge(edge)) => {
                let (short, long) = (height.min(width).max(1), height.max(width));
                let long = u64::from(edge) * u64::from(long) / u64::from(short);
                let long = u32::try_from(long).unwrap_or(u32::MAX);
                if width <= height { (long, edge) } else { (edge, long) }
            }
            Some(Size::Patches { patch_size, max_num_patches }) => {
                whole_patches(height, width, patch_size, max_num_patches)
            }
            Some(Size::SoftTokens { patch_size, pooling_kernel_size, max_soft_tokens }) => {
                let side = patch_size * pooling_kernel_size;
                let (rows, columns) = soft_tokens(height, width, side, max_soft_tokens);
                if u64::from(rows) * u64::from(columns) < u64::from(height) * u64::from(width) {
                    tell_once(format!(
                        "pictures larger than max_soft_tokens ({max_soft_tokens} tokens of {side} x {side} pixels) are scaled \
                         down; they keep their shape, but for slivers"
                    ));
                }
                (rows, columns)
            }
            Some(Size::Budget(budget)) => budget.size(height, width)?,
        })
    }

    fn crop_and_normalise(&self, bytes: &[u8], height: usize, width: usize) -> Pixels {
        let (to_height, to_width) =
            self.crop_size.map_or((height, width), |(height, width)| (height as usize, width as usize));
        let overlap = |old, new| centre(self.backend, old, new);
        let (rows, columns) = (overlap(height, to_height), overlap(width, to_width));
        let plane = to_height * to_width;
        let mut data = vec![0f32; 3 * plane];
        for (channel, table) in self.table.iter().enumerate() {
            let plane = &mut data[channel * plane..(channel + 1) * plane];
            if rows.len < to_height || columns.len < to_width {
                plane.fill(table[0]);
            }
            for row in 0..rows.len {
                let from = ((rows.from + row) * width + columns.from) * 3;
                let to = (rows.to + row) * to_width + columns.to;
                let from = bytes[from..from + 3 * columns.len].chunks_exact(3);
                for (to, from) in plane[to..to + columns.len].iter_mut().zip(from) {
                    *to = table[usize::from(from[channel])];
                }
            }
        }
        Pixels { data, height: to_height, width: to_width }
    }
}

/// The height and width in whole patches at the largest scale, found by halving, that makes no more of them than
/// `most`: `get_image_size_for_max_num_patches`.
fn whole_patches(height: u32, width: u32, patch_size: u32, most: u32) -> (u32, u32) {
    const EPS: f64 = 1e-5;
    let patches = |side: u32, scale: f64| (f64::from(side) * scale / f64::from(patch_size)).ceil().max(1.0);
    let (mut least, mut largest) = (EPS / 10.0, 100.0);
    while largest - least >= EPS {
        let scale = (least + largest) / 2.0;
        if patches(height, scale) * patches(width, scale) <= f64::from(most) {
            least = scale;
        } else {
            largest = scale;
        }
    }
    let side = |side| (patches(side, least) as u32).saturating_mul(patch_size);
    (side(height), side(width))
}

/// The budgets that Gemma 4's processor takes.
const SOFT_TOKENS: [u32; 5] = [70, 140, 280, 560, 1120];

/// An error where Gemma 4's processor does not take so many tokens a picture, which stand under `key`.
pub(crate) fn soft_token_budget(key: &str, tokens: u32) -> Result<()> {
    ensure!(
        SOFT_TOKENS.contains(&tokens),
        "{key} is {tokens}, Gemma 4's processor takes {}",
        SOFT_TOKENS.map(|tokens| tokens.to_string()).join(", ")
    );
    Ok(())
}

/// The height and width in whole tokens of `side` pixels, no more of them than `most`, at which a picture keeps its aspect
/// as nearly as that goes; a sliver is one token high or wide: `get_aspect_ratio_preserving_size`.
fn soft_tokens(height: u32, width: u32, side: u32, most: u32) -> (u32, u32) {
    let (h, w) = (f64::from(height.max(1)), f64::from(width.max(1)));
    let factor = (f64::from(most) * f64::from(side).powi(2) / (h * w)).sqrt();
    let tokens = |ideal: f64| (ideal / f64::from(side)).floor() as u32;
    let (rows, columns) = match (tokens(factor * h), tokens(factor * w)) {
        (0, _) => (1, tokens_of_sliver(w / h, most)),
        (_, 0) => (tokens_of_sliver(h / w, most), 1),
        both => both,
    };
    (rows * side, columns * side)
}

/// Tokens along a sliver that is so many times longer than wide.
fn tokens_of_sliver(aspect: f64, most: u32) -> u32 {
    (aspect.floor() as u32).clamp(1, most)
}

/// What lies in the middle of both an old and a new side: where it starts in each, and how long it is.
struct Overlap {
    from: usize,
    to: usize,
    len: usize,
}

/// Where the odd pixel goes is as the backend's `center_crop` has it.
fn centre(backend: Backend, old: usize, new: usize) -> Overlap {
    if new > old {
        let to = match backend {
            Backend::Torchvision => (new - old) / 2,
            Backend::Pillow => (new - old).div_ceil(2),
        };
        Overlap { from: 0, to, len: old }
    } else {
        Overlap { from: (old - new) / 2, to: 0, len: new }
    }
}

/// `value / 255`, less mean, over std, in the order and precision of the reference: torchvision's processors first
/// scale mean and std to bytes, in f32; Pillow's scale the bytes in f64, round, and normalise in f32.
fn byte_values(
    backend: Backend,
    rescale: Option<f64>,
    mean_std: Option<([f64; 3], [f64; 3])>,
    channel: usize,
) -> [f32; 256] {
    let (factor, bytes) = (rescale.unwrap_or(1.0), std::array::from_fn::<f32, 256, _>(|byte| byte as f32));
    let scaled = |byte: f32| match backend {
        Backend::Torchvision => byte * factor as f32,
        Backend::Pillow => (f64::from(byte) * factor) as f32,
    };
    let Some((mean, std)) = mean_std else { return bytes.map(scaled) };
    let (mean, std) = (mean[channel] as f32, std[channel] as f32);
    match backend {
        Backend::Torchvision => {
            let scale = (1.0 / factor) as f32;
            bytes.map(|byte| (byte - mean * scale) / (std * scale))
        }
        Backend::Pillow => bytes.map(|byte| (scaled(byte) - mean) / std),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decode::decode_image;
    use serde_json::{Value, json};

    /// Every case of a golden file, to the last bit.
    fn equals_hugging_face(name: &str) {
        let (golden, pictures) = (fixtures::arrays(name), fixtures::arrays("preprocess"));
        let text = std::fs::read(fixtures::root().join(format!("golden/{name}.json"))).unwrap();
        let cases: Vec<Value> = serde_json::from_slice(&text).unwrap();
        assert!(cases.len() >= 10);
        for case in cases {
            let (name, image) = (case["name"].as_str().unwrap(), case["image"].as_str().unwrap());
            let decoded = &pictures[&format!("decoded.{image}")]; // [height, width, 3], as Pillow decodes it
            let [height, width, 3] = decoded.shape[..] else { panic!("{:?}", decoded.shape) };
            let image = RgbImage::from_raw(width as u32, height as u32, decoded.bytes()).unwrap();
            let processor = ImageProcessor::from_json(case["config"].clone()).unwrap();
            let found = processor.preprocess(&image).unwrap();
            assert_eq!(
                (found.height as u32, found.width as u32),
                processor.output_size(image.height(), image.width()).unwrap(),
                "{name}"
            );
            let golden = &golden[&format!("pixel_values.{name}")];
            let difference = golden.difference(&[3, found.height, found.width], found.data.iter().copied());
            assert_eq!(difference.largest, 0.0, "{name}");
            let again = ImageProcessor::from_json(processor.to_json()).unwrap().preprocess(&image).unwrap();
            assert_eq!(again, found, "{name}: to_json loses something");
        }
    }

    #[test]
    fn equals_hugging_face_on_the_same_bytes() {
        equals_hugging_face("preprocess");
    }

    #[test]
    fn equals_pillow_and_what_a_class_leaves_unsaid() {
        equals_hugging_face("preprocess_backends");
    }

    #[test]
    fn backends_differ_by_two_of_255_at_most() {
        let bytes = std::fs::read(fixtures::root().join("images/photo.jpg")).unwrap();
        let image = decode_image(&bytes).unwrap();
        let torchvision = ImageProcessor::square(24, [0.0; 3], [1.0; 3], Resample::Bicubic);
        let pillow = torchvision.with_backend(Backend::Pillow);
        let [a, b] = [&torchvision, &pillow].map(|processor| processor.preprocess(&image).unwrap().data);
        let difference = a.iter().zip(&b).map(|(a, b)| (a - b).abs() * 255.0).fold(0.0, f32::max);
        assert!(difference > 0.5 && difference < 2.5, "{difference}");
    }

    #[test]
    fn a_square_of_another_size() {
        let bytes = std::fs::read(fixtures::root().join("images/photo.jpg")).unwrap();
        let image = decode_image(&bytes).unwrap();
        let (mean, std) = IMAGENET_DEFAULT;
        let processor = ImageProcessor::square(28, mean, std, Resample::Bicubic);
        let pixels = processor.preprocess(&image).unwrap();
        assert_eq!((pixels.height, pixels.width, pixels.data.len()), (28, 28, 3 * 28 * 28));
        let small = processor.with_aspect(14, Aspect::Squash).preprocess(&image).unwrap();
        assert_eq!((small.height, small.width), (14, 14));
    }

    /// A picture of one colour with a frame of another.
    fn framed(height: u32, width: u32) -> RgbImage {
        RgbImage::from_fn(width, height, |x, y| {
            let is_edge = x == 0 || y == 0 || x + 1 == width || y + 1 == height;
            if is_edge { [200, 10, 30].into() } else { [40, 90, 250].into() }
        })
    }

    #[test]
    fn a_picture_that_is_not_square_is_padded_squashed_or_cropped() {
        let (mean, std) = OPENAI_CLIP;
        let base = ImageProcessor::square(8, mean, std, Resample::Bicubic);
        let black = Aspect::Pad([0; 3]);
        for backend in [Backend::Torchvision, Backend::Pillow] {
            let base = base.with_backend(backend);
            for (height, width) in [(7, 20), (20, 7), (12, 13), (13, 12), (300, 2), (9, 9)] {
                let picture = framed(height, width);
                let side = height.max(width);
                // In three steps that are each simple.
                let mut square = RgbImage::new(side, side);
                let (above, before) = ((side - height) / 2, (side - width) / 2);
                for (x, y, pixel) in picture.enumerate_pixels() {
                    square.put_pixel(before + x, above + y, *pixel);
                }
                let pixels = |aspect: Aspect| base.with_aspect(8, aspect).preprocess(&picture).unwrap();
                assert_eq!(pixels(black), base.preprocess(&square).unwrap(), "{height} x {width}");
                assert_eq!(pixels(Aspect::Squash), base.preprocess(&picture).unwrap());
                let all = [black, Aspect::Pad([9, 8, 7]), Aspect::Squash, Aspect::Crop];
                for (idx, aspect) in all.into_iter().enumerate() {
                    let processor = base.with_aspect(8, aspect);
                    assert_eq!((processor.aspect(), processor.output_size(height, width).unwrap()), (aspect, (8, 8)));
                    let again = ImageProcessor::from_json(processor.to_json()).unwrap();
                    assert_eq!(again.aspect(), aspect);
                    assert_eq!(again.preprocess(&picture).unwrap(), pixels(aspect));
                    for other in &all[..idx] {
                        let is_same = pixels(*other) == pixels(aspect);
                        // A sliver is all frame, and of one pixel more or less nothing need be seen.
                        let may_be_same = height.min(width) < 7 || height.abs_diff(width) == 1;
                        assert!(may_be_same || is_same == (height == width), "{other:?} {aspect:?}");
                    }
                }
            }
        }
        // Bars of the mean are what Hugging Face's own class makes, and need no key of ours.
        let padded = base.with_aspect(8, Aspect::Pad(base.mean_color())).to_json();
        assert_eq!((&padded["image_processor_type"], &padded["do_pad"]), (&json!("LlavaImageProcessor"), &json!(true)));
        assert_eq!(padded.get("background_color"), None);
        assert_eq!(base.mean_color(), [122, 116, 104]);
        assert_eq!(base.with_aspect(8, black).to_json()["background_color"], json!([0, 0, 0]));
    }

    #[test]
    fn a_picture_within_a_budget_keeps_its_shape() {
        let budget = TokenBudget::new(4, 2, 12).unwrap();
        let (mean, std) = IMAGENET_DEFAULT;
        let base = ImageProcessor::square(8, mean, std, Resample::Bicubic);
        let keeps = base.with_aspect(8, Aspect::Keep(budget));
        let again = ImageProcessor::from_json(keeps.to_json()).unwrap();
        assert_eq!((keeps.aspect(), again.aspect()), (Aspect::Keep(budget), Aspect::Keep(budget)));
        for (width, height, columns, rows) in [(8, 8, 2, 2), (60, 20, 6, 2), (13, 40, 1, 6), (3, 3, 2, 2), (4, 4, 2, 2)]
        {
            let picture = RgbImage::from_fn(width, height, |x, y| [x as u8, y as u8, 90].into());
            let pixels = again.preprocess(&picture).unwrap();
            assert_eq!((pixels.width, pixels.height), (4 * columns, 4 * rows), "{width} x {height}");
            // A square is one shape of many.
            if width == height {
                assert_eq!(pixels, base.preprocess(&picture).unwrap());
            }
        }
        let error = keeps.preprocess(&RgbImage::new(13, 1)).unwrap_err().to_string();
        assert!(error.contains("a picture of 13 x 1 pixels cannot keep its shape within 12 tokens"), "{error}");
        let refused = |key: &str, value: Value| {
            let mut json = keeps.to_json();
            json[key] = value;
            ImageProcessor::from_json(json).unwrap_err().to_string()
        };
        assert!(refused("max_image_tokens", json!(0)).contains("max_image_tokens is 0"));
        assert!(refused("min_image_tokens", json!(13)).contains("more than max_image_tokens, 12"));
        assert!(refused("patch_size", Value::Null).contains("patch_size is missing"));
        assert!(refused("do_center_crop", json!(true)).contains("do_center_crop"));
    }

    #[test]
    fn a_sliver_is_refused_before_it_grows() {
        let processor = ImageProcessor::from_json(json!({"size": {"shortest_edge": 224}})).unwrap();
        let error = processor.preprocess(&RgbImage::new(1, 65_000)).unwrap_err().to_string();
        assert!(error.contains("1 x 65000 pixels would be resized to 224 x 14560000"), "{error}");
        for processor in [processor.with_backend(Backend::Pillow), processor] {
            let error = processor.preprocess(&RgbImage::new(0, 3)).unwrap_err().to_string();
            assert_eq!(error, "a picture of 0 x 3 pixels shows nothing");
        }
    }
}

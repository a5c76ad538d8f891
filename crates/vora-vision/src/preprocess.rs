//! RGB picture -> normalised pixels, exactly as Hugging Face's torchvision-backed image processors compute them.

use std::borrow::Cow;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use fast_image_resize::images::{TypedImage, TypedImageRef};
use fast_image_resize::pixels::U8x3;
use fast_image_resize::{FilterType, ResizeAlg, ResizeOptions, Resizer};
use image::RgbImage;
use serde::Deserialize;
use serde_json::{Value, json};
use tch::Tensor;

use crate::image::MAX_PIXELS;

/// Mean and standard deviation of ImageNet's channels, which DINOv2 and many others were trained with.
pub const IMAGENET_DEFAULT: ([f64; 3], [f64; 3]) = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]);
const OPENAI_CLIP: ([f64; 3], [f64; 3]) =
    ([0.481_454_66, 0.457_827_5, 0.408_210_73], [0.268_629_54, 0.261_302_58, 0.275_777_11]);
const HALF: ([f64; 3], [f64; 3]) = ([0.5; 3], [0.5; 3]);

/// A picture as a model takes it, in plain memory: worker threads make it without touching tensors.
#[derive(Debug, Clone, PartialEq)]
pub struct Pixels {
    /// `[3, height, width]`, row by row.
    pub data: Vec<f32>,
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
}

impl Pixels {
    /// `[3, height, width]`, f32 on the CPU
    pub fn to_tensor(&self) -> Tensor {
        Tensor::from_slice(&self.data).view([3, self.height as i64, self.width as i64])
    }
}

/// `[pictures, 3, height, width]`, f32 on the CPU.
///
/// # Errors
/// Where there is no picture, or where two differ in size.
pub fn stack(pixels: &[Pixels]) -> Result<Tensor> {
    let Some(first) = pixels.first() else { bail!("no pictures to stack") };
    for other in pixels {
        ensure!(
            (other.height, other.width) == (first.height, first.width),
            "pictures of {} x {} and {} x {} pixels do not stack",
            first.width,
            first.height,
            other.width,
            other.height
        );
    }
    Ok(Tensor::stack(&pixels.iter().map(Pixels::to_tensor).collect::<Vec<_>>(), 0))
}

/// How a picture is sampled at its new size; on disk Pillow's number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resample {
    /// 0: the nearest pixel.
    Nearest,
    /// 1: windowed sinc over three lobes, as Pillow has it (Hugging Face falls back to bicubic on torchvision < 0.27).
    Lanczos,
    /// 2: triangle, widened when shrinking.
    Bilinear,
    /// 3: Catmull-Rom, widened when shrinking.
    Bicubic,
}

impl Resample {
    fn from_pillow(number: u8) -> Result<Self> {
        Ok(match number {
            0 => Self::Nearest,
            1 => Self::Lanczos,
            2 => Self::Bilinear,
            3 => Self::Bicubic,
            _ => bail!("resample is {number}, supported are 0 nearest, 1 lanczos, 2 bilinear, 3 bicubic"),
        })
    }
}

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
}

/// Resize, crop, rescale and normalise: what a `preprocessor_config.json` describes.
#[derive(Debug, Clone)]
pub struct ImageProcessor {
    size: Option<Size>,
    resample: Resample,
    crop_size: Option<(u32, u32)>, // height, width
    rescale_factor: Option<f64>,
    mean_std: Option<([f64; 3], [f64; 3])>,
    table: Vec<[f32; 256]>, // one a channel: the value of each byte
}

impl ImageProcessor {
    /// Every picture becomes `image_size` x `image_size`, whatever its aspect.
    pub fn square(image_size: u32, image_mean: [f64; 3], image_std: [f64; 3], resample: Resample) -> Self {
        let size = Some(Size::Exact { height: image_size, width: image_size });
        Self::new(size, resample, None, Some(1.0 / 255.0), Some((image_mean, image_std)))
    }

    fn new(
        size: Option<Size>,
        resample: Resample,
        crop_size: Option<(u32, u32)>,
        rescale_factor: Option<f64>,
        mean_std: Option<([f64; 3], [f64; 3])>,
    ) -> Self {
        let table = (0..3).map(|channel| byte_values(rescale_factor, mean_std, channel)).collect();
        Self { size, resample, crop_size, rescale_factor, mean_std, table }
    }

    /// Reads `preprocessor_config.json` of a model folder, or the `image_processor` inside `processor_config.json`.
    ///
    /// # Errors
    /// Names the file, and the key that this crate cannot follow.
    pub fn open(folder: &Path) -> Result<Self> {
        let alone = folder.join("preprocessor_config.json");
        let path = if alone.exists() { alone } else { folder.join("processor_config.json") };
        let bytes = std::fs::read(&path)
            .with_context(|| format!("no preprocessor_config.json or processor_config.json in {}", folder.display()))?;
        let json = serde_json::from_slice(&bytes).with_context(|| format!("{} is not JSON", path.display()))?;
        Self::from_json(json).with_context(|| format!("in {}", path.display()))
    }

    /// From the object that such a file holds. Keys that it lacks are as its `image_processor_type` has them.
    ///
    /// # Errors
    /// Where the type is not known here, or a key asks for what this crate does not do.
    pub fn from_json(mut json: Value) -> Result<Self> {
        if let Some(nested) = json.get_mut("image_processor") {
            json = nested.take();
        }
        let keys: Keys = serde_json::from_value(json)?;
        let class = keys.image_processor_type.or(keys.feature_extractor_type).unwrap_or_else(|| "Bit".to_owned());
        let class = class.trim_end_matches("Fast").trim_end_matches("ImageProcessor");
        let class = class.trim_end_matches("FeatureExtractor");
        let class = Class::named(class)?;
        ensure!(!keys.do_pad.unwrap_or(false), "do_pad is true, padding is not supported");

        let size = keys.size.map_or(Ok(class.size), |size| size.target(class.short_size))?;
        let crop = keys.crop_size.map_or(Ok(Size::Exact { height: 224, width: 224 }), |size| size.target(false))?;
        let Size::Exact { height, width } = crop else { bail!("crop_size needs a height and a width") };
        ensure!(height > 0 && width > 0, "crop_size is {height} x {width}, both must be at least 1");
        let resample = keys.resample.map_or(Ok(class.resample), Resample::from_pillow)?;
        let rescale_factor = keys.rescale_factor.unwrap_or(1.0 / 255.0);
        let image_mean = keys.image_mean.unwrap_or(class.mean_std.0);
        let image_std = keys.image_std.unwrap_or(class.mean_std.1);
        ensure!(rescale_factor > 0.0, "rescale_factor is {rescale_factor}, it must be above 0");
        ensure!(image_std.iter().all(|&std| std > 0.0), "image_std is {image_std:?}, each must be above 0");
        Ok(Self::new(
            keys.do_resize.unwrap_or(true).then_some(size),
            resample,
            keys.do_center_crop.unwrap_or(class.do_center_crop).then_some((height, width)),
            keys.do_rescale.unwrap_or(true).then_some(rescale_factor),
            keys.do_normalize.unwrap_or(true).then_some((image_mean, image_std)),
        ))
    }

    /// The object that [`ImageProcessor::from_json`] and Hugging Face's `AutoImageProcessor` read.
    pub fn to_json(&self) -> Value {
        let (image_mean, image_std) = self.mean_std();
        let mut json = json!({
            "image_processor_type": "BitImageProcessor",
            "do_convert_rgb": true,
            "do_resize": self.size.is_some(),
            "resample": self.resample as u8,
            "do_center_crop": self.crop_size.is_some(),
            "do_rescale": self.rescale_factor.is_some(),
            "do_normalize": self.mean_std.is_some(),
            "image_mean": image_mean,
            "image_std": image_std,
        });
        match self.size {
            Some(Size::ShortestEdge(edge)) => json["size"] = json!({"shortest_edge": edge}),
            Some(Size::Exact { height, width }) => json["size"] = json!({"height": height, "width": width}),
            None => {}
        }
        if let Some((height, width)) = self.crop_size {
            json["crop_size"] = json!({"height": height, "width": width});
        }
        if let Some(factor) = self.rescale_factor {
            json["rescale_factor"] = json!(factor);
        }
        json
    }

    /// The channels' mean and standard deviation; 0 and 1 where pictures are not normalised.
    pub fn mean_std(&self) -> ([f64; 3], [f64; 3]) {
        self.mean_std.unwrap_or(([0.0; 3], [1.0; 3]))
    }

    /// The same processor for pictures of `image_size` x `image_size`: same channels and sampling, no crop.
    #[must_use]
    pub fn at(&self, image_size: u32) -> Self {
        let size = Some(Size::Exact { height: image_size, width: image_size });
        Self::new(size, self.resample, None, self.rescale_factor, self.mean_std)
    }

    /// The height and width of what comes out for a picture of that height and width.
    pub fn output_size(&self, height: u32, width: u32) -> (u32, u32) {
        self.crop_size.unwrap_or_else(|| self.resized(height, width))
    }

    /// Resizes, crops (filling up with black where the picture is smaller), rescales and normalises.
    ///
    /// # Errors
    /// Where resizing would make more than [`MAX_PIXELS`] pixels, as for a picture one pixel wide and very long.
    pub fn preprocess(&self, image: &RgbImage) -> Result<Pixels> {
        let (from_height, from_width) = (image.height(), image.width());
        let (height, width) = self.resized(from_height, from_width);
        let most = u64::from(width) * u64::from(height.max(from_height));
        ensure!(
            most <= MAX_PIXELS,
            "a picture of {from_width} x {from_height} pixels would be resized to {width} x {height}, over the limit"
        );
        let bytes = resize(image.as_raw(), (from_height, from_width), (height, width), self.resample)?;
        Ok(self.crop_and_normalise(&bytes, height as usize, width as usize))
    }

    fn resized(&self, height: u32, width: u32) -> (u32, u32) {
        match self.size {
            None => (height, width),
            Some(Size::Exact { height, width }) => (height, width),
            Some(Size::ShortestEdge(edge)) => {
                let (short, long) = (height.min(width).max(1), height.max(width));
                let long = u64::from(edge) * u64::from(long) / u64::from(short);
                let long = u32::try_from(long).unwrap_or(u32::MAX);
                if width <= height { (long, edge) } else { (edge, long) }
            }
        }
    }

    fn crop_and_normalise(&self, bytes: &[u8], height: usize, width: usize) -> Pixels {
        let (to_height, to_width) =
            self.crop_size.map_or((height, width), |(height, width)| (height as usize, width as usize));
        let (rows, columns) = (centre(height, to_height), centre(width, to_width));
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

/// What lies in the middle of both an old and a new side: where it starts in each, and how long it is.
struct Overlap {
    from: usize,
    to: usize,
    len: usize,
}

/// Where the odd pixel goes is as Hugging Face's `center_crop` has it.
fn centre(old: usize, new: usize) -> Overlap {
    if new > old {
        Overlap { from: 0, to: (new - old) / 2, len: old }
    } else {
        Overlap { from: (old - new) / 2, to: 0, len: new }
    }
}

/// `value / 255`, less mean, over std, in the order and precision of the reference: mean and std are first scaled
/// to bytes, in f32.
fn byte_values(rescale: Option<f64>, mean_std: Option<([f64; 3], [f64; 3])>, channel: usize) -> [f32; 256] {
    let bytes: [f32; 256] = std::array::from_fn(|byte| byte as f32);
    match (rescale, mean_std) {
        (rescale, Some((mean, std))) => {
            let scale = rescale.map_or(1.0, |factor| (1.0 / factor) as f32);
            let (mean, std) = (mean[channel] as f32 * scale, std[channel] as f32 * scale);
            bytes.map(|byte| (byte - mean) / std)
        }
        (Some(factor), None) => bytes.map(|byte| byte * factor as f32),
        (None, None) => bytes,
    }
}

/// Resamples interleaved RGB, first along rows, then along columns, rounding to bytes after each as torchvision does.
fn resize(bytes: &[u8], from: (u32, u32), to: (u32, u32), resample: Resample) -> Result<Cow<'_, [u8]>> {
    let filter = match resample {
        Resample::Nearest => return Ok(nearest(bytes, from, to)),
        Resample::Lanczos => FilterType::Lanczos3,
        Resample::Bilinear => FilterType::Bilinear,
        Resample::Bicubic => FilterType::CatmullRom,
    };
    let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(filter)).use_alpha(false);
    let ((from_height, from_width), (height, width)) = (from, to);
    let mut resizer = Resizer::new();
    let mut pass = |bytes: &[u8], from: (u32, u32), to: (u32, u32)| -> Result<Vec<u8>> {
        // The typed call: the untyped one compiles every pixel type into this crate, for minutes.
        let from = TypedImageRef::<U8x3>::from_buffer(from.1, from.0, bytes)?;
        let mut pixels = vec![0; 3 * to.0 as usize * to.1 as usize];
        let mut resized = TypedImage::<U8x3>::from_buffer(to.1, to.0, &mut pixels)?;
        resizer.resize_typed(&from, &mut resized, &options)?;
        Ok(pixels)
    };
    let mut bytes = Cow::Borrowed(bytes);
    if width != from_width {
        bytes = Cow::Owned(pass(&bytes, from, (from_height, width))?);
    }
    if height != from_height {
        bytes = Cow::Owned(pass(&bytes, (from_height, width), to)?);
    }
    Ok(bytes)
}

/// Each new pixel is the old one under its centre, as Pillow and torch's `nearest-exact` have it.
fn nearest(bytes: &[u8], from: (u32, u32), to: (u32, u32)) -> Cow<'_, [u8]> {
    if from == to {
        return Cow::Borrowed(bytes);
    }
    let source =
        |i: u32, from: u32, to: u32| (((i as f32 + 0.5) * (from as f32 / to as f32)) as u32).min(from - 1) as usize;
    let mut resized = Vec::with_capacity(to.0 as usize * to.1 as usize * 3);
    for row in 0..to.0 {
        let line = source(row, from.0, to.0) * from.1 as usize;
        for column in 0..to.1 {
            let at = (line + source(column, from.1, to.1)) * 3;
            resized.extend_from_slice(&bytes[at..at + 3]);
        }
    }
    Cow::Owned(resized)
}

/// The keys that are followed; others that Hugging Face writes say nothing about pixels.
#[derive(Deserialize)]
struct Keys {
    image_processor_type: Option<String>,
    feature_extractor_type: Option<String>,
    do_resize: Option<bool>,
    size: Option<SizeKeys>,
    resample: Option<u8>,
    do_center_crop: Option<bool>,
    crop_size: Option<SizeKeys>,
    do_rescale: Option<bool>,
    rescale_factor: Option<f64>,
    do_normalize: Option<bool>,
    image_mean: Option<[f64; 3]>,
    image_std: Option<[f64; 3]>,
    do_pad: Option<bool>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum SizeKeys {
    Number(u32),
    Map { height: Option<u32>, width: Option<u32>, shortest_edge: Option<u32>, longest_edge: Option<u32> },
}

impl SizeKeys {
    /// A bare number is the shorter side, or a square's.
    fn target(&self, short: bool) -> Result<Size> {
        let size = match *self {
            Self::Number(edge) if short => Size::ShortestEdge(edge),
            Self::Number(edge) => Size::Exact { height: edge, width: edge },
            Self::Map { height: Some(height), width: Some(width), shortest_edge: None, longest_edge: None } => {
                Size::Exact { height, width }
            }
            Self::Map { height: None, width: None, shortest_edge: Some(edge), longest_edge: None } => {
                Size::ShortestEdge(edge)
            }
            Self::Map { .. } => bail!("size has neither `shortest_edge` alone nor `height` and `width`"),
        };
        ensure!(
            !matches!(size, Size::ShortestEdge(0) | Size::Exact { height: 0, .. } | Size::Exact { width: 0, .. }),
            "size is 0, it must be at least 1"
        );
        Ok(size)
    }
}

/// What a class of processors does where its file says nothing.
struct Class {
    size: Size,
    short_size: bool, // a bare number as size is the shorter side
    resample: Resample,
    do_center_crop: bool,
    mean_std: ([f64; 3], [f64; 3]),
}

impl Class {
    fn named(name: &str) -> Result<Self> {
        let whole = Size::Exact { height: 224, width: 224 };
        let bit = Self {
            size: Size::ShortestEdge(224),
            short_size: true,
            resample: Resample::Bicubic,
            do_center_crop: true,
            mean_std: OPENAI_CLIP,
        };
        let vit = Self {
            size: whole,
            short_size: false,
            resample: Resample::Bilinear,
            do_center_crop: false,
            mean_std: HALF,
        };
        Ok(match name {
            "Bit" | "CLIP" => bit,
            "ViT" => vit,
            "Siglip" => Self { resample: Resample::Bicubic, ..vit },
            _ => bail!("image_processor_type `{name}ImageProcessor` is not one of Bit, CLIP, ViT, Siglip"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::decode_image;

    #[test]
    fn equals_hugging_face_on_the_same_bytes() {
        let golden = fixtures::open("preprocess");
        let text = std::fs::read(fixtures::root().join("golden/preprocess.json")).unwrap();
        let cases: Vec<Value> = serde_json::from_slice(&text).unwrap();
        assert!(cases.len() >= 10);
        for case in cases {
            let (name, image) = (case["name"].as_str().unwrap(), case["image"].as_str().unwrap());
            let decoded = &golden[&format!("decoded.{image}")]; // [height, width, 3], as Pillow decodes it
            let (height, width, _) = decoded.size3().unwrap();
            let bytes = Vec::<u8>::try_from(decoded.flatten(0, -1)).unwrap();
            let image = RgbImage::from_raw(width as u32, height as u32, bytes).unwrap();
            let processor = ImageProcessor::from_json(case["config"].clone()).unwrap();
            let found = processor.preprocess(&image).unwrap();
            assert_eq!(
                (found.height as u32, found.width as u32),
                processor.output_size(image.height(), image.width()),
                "{name}"
            );
            let (found, expected) = (found.to_tensor(), &golden[&format!("pixel_values.{name}")]);
            assert_eq!(found.size(), expected.size(), "{name}");
            let difference = (&found - expected).abs().max().double_value(&[]);
            assert!(difference == 0.0, "{name} differs by {difference}");
            let again = ImageProcessor::from_json(processor.to_json()).unwrap().preprocess(&image).unwrap();
            assert!(again.to_tensor().equal(&found), "{name}: to_json loses something");
        }
    }

    #[test]
    fn square_and_stack() {
        let bytes = std::fs::read(fixtures::root().join("images/photo.jpg")).unwrap();
        let image = decode_image(&bytes).unwrap();
        let (mean, std) = IMAGENET_DEFAULT;
        let processor = ImageProcessor::square(28, mean, std, Resample::Bicubic);
        let pixels = processor.preprocess(&image).unwrap();
        assert_eq!((pixels.height, pixels.width, pixels.data.len()), (28, 28, 3 * 28 * 28));
        let small = processor.at(14).preprocess(&image).unwrap();
        assert_eq!(stack(&[pixels.clone(), pixels.clone()]).unwrap().size(), [2, 3, 28, 28]);
        let error = stack(&[pixels, small]).unwrap_err().to_string();
        assert_eq!(error, "pictures of 28 x 28 and 14 x 14 pixels do not stack");
        assert!(stack(&[]).is_err());
    }

    #[test]
    fn a_sliver_is_refused_before_it_grows() {
        let processor = ImageProcessor::from_json(json!({"size": {"shortest_edge": 224}})).unwrap();
        let error = processor.preprocess(&RgbImage::new(1, 65_000)).unwrap_err().to_string();
        assert!(error.contains("1 x 65000 pixels would be resized to 224 x 14560000"), "{error}");
    }

    #[test]
    fn configs_that_cannot_be_followed_are_refused() {
        let refuse = |json: Value| format!("{:#}", ImageProcessor::from_json(json).unwrap_err());
        let error = refuse(json!({"image_processor_type": "Qwen2VLImageProcessorFast"}));
        assert!(error.contains("`Qwen2VLImageProcessor` is not one of Bit, CLIP, ViT, Siglip"), "{error}");
        assert!(refuse(json!({"resample": 5})).contains("resample is 5"));
        assert!(refuse(json!({"do_pad": true})).contains("do_pad"));
        assert!(refuse(json!({"size": {"max_height": 3}})).contains("shortest_edge"));
        assert!(refuse(json!({"image_std": [0.0, 1.0, 1.0]})).contains("image_std"));
        let error = format!("{:#}", ImageProcessor::open(Path::new("nowhere")).unwrap_err());
        assert!(error.contains("no preprocessor_config.json or processor_config.json in nowhere"), "{error}");
    }
}

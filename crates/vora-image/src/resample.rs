//! Pictures at another size, in bytes, to the last bit as torchvision and Pillow compute them.

use std::borrow::Cow;
use std::f64::consts::PI;

use anyhow::{Result, bail};
use fast_image_resize::images::{TypedImage, TypedImageRef};
use fast_image_resize::pixels::U8x3;
use fast_image_resize::{FilterType, ResizeAlg, ResizeOptions, Resizer};

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
    pub(crate) fn from_pillow(number: u8) -> Result<Self> {
        Ok(match number {
            0 => Self::Nearest,
            1 => Self::Lanczos,
            2 => Self::Bilinear,
            3 => Self::Bicubic,
            _ => bail!("resample is {number}, supported are 0 nearest, 1 lanczos, 2 bilinear, 3 bicubic"),
        })
    }
}

/// Whose arithmetic a picture goes through: results differ by up to 2 of 255, and by more where Pillow 13 resamples the
/// columns of a tall picture before its rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Backend {
    /// torchvision's, which Hugging Face's processors use unless told otherwise.
    #[default]
    Torchvision,
    /// Pillow's and numpy's: `backend="pil"`, once `use_fast=False`.
    Pillow,
}

/// Resamples interleaved RGB, first along rows, then along columns (Pillow at times the other way round), rounding to
/// bytes after each as both backends do.
pub(crate) fn resize(
    bytes: &[u8],
    from: (u32, u32),
    to: (u32, u32),
    resample: Resample,
    backend: Backend,
) -> Result<Cow<'_, [u8]>> {
    let filter = match resample {
        Resample::Nearest => return Ok(nearest(bytes, from, to)),
        Resample::Lanczos => Filter::Lanczos,
        Resample::Bilinear => Filter::Triangle,
        Resample::Bicubic => Filter::CatmullRom,
    };
    match backend {
        Backend::Torchvision => torchvision(bytes, from, to, filter),
        Backend::Pillow => Ok(pillow(bytes, from, to, filter)),
    }
}

/// What weighs the old pixels around the centre of a new one.
#[derive(Debug, Clone, Copy)]
enum Filter {
    Lanczos,
    Triangle,
    CatmullRom,
}

impl Filter {
    /// The distance from which on it is zero.
    fn support(self) -> f64 {
        match self {
            Self::Lanczos => 3.0,
            Self::Triangle => 1.0,
            Self::CatmullRom => 2.0,
        }
    }

    /// Its height at a distance from its centre.
    fn at(self, x: f64) -> f64 {
        let x = x.abs();
        let sinc = |x: f64| if x == 0.0 { 1.0 } else { (PI * x).sin() / (PI * x) };
        match self {
            _ if x >= self.support() => 0.0,
            Self::Lanczos => sinc(x) * sinc(x / 3.0),
            Self::Triangle => 1.0 - x,
            Self::CatmullRom if x < 1.0 => (1.5 * x - 2.5) * x * x + 1.0,
            Self::CatmullRom => -0.5 * (((x - 5.0) * x + 8.0) * x - 4.0),
        }
    }
}

/// Weights of 16 bits, as torchvision's kernels have them.
fn torchvision(bytes: &[u8], from: (u32, u32), to: (u32, u32), filter: Filter) -> Result<Cow<'_, [u8]>> {
    let filter = match filter {
        Filter::Lanczos => FilterType::Lanczos3,
        Filter::Triangle => FilterType::Bilinear,
        Filter::CatmullRom => FilterType::CatmullRom,
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

/// Weights of 22 bits, as Pillow's `ImagingResample` has them for bytes. Where the height loses more than twice the
/// pixels that the width loses (or the width gains some), columns come before rows, since Pillow 13.
fn pillow(bytes: &[u8], from: (u32, u32), to: (u32, u32), filter: Filter) -> Cow<'_, [u8]> {
    let ((from_height, from_width), (height, width)) = (from, to);
    let lost = |from: u32, to: u32| i64::from(from) - i64::from(to);
    let columns_first = height < from_height && lost(from_height, height) > 2 * lost(from_width, width);
    let mut bytes = Cow::Borrowed(bytes);
    if columns_first {
        bytes = Cow::Owned(along_columns(&bytes, from_width, from_height, height, filter));
    }
    if width != from_width {
        bytes = Cow::Owned(along_rows(&bytes, from_width, width, filter));
    }
    if height != from_height && !columns_first {
        bytes = Cow::Owned(along_columns(&bytes, width, from_height, height, filter));
    }
    bytes
}

/// Every row of `from` pixels with `to` pixels.
fn along_rows(bytes: &[u8], from: u32, to: u32, filter: Filter) -> Vec<u8> {
    let taps = taps(from as usize, to as usize, filter);
    let mut resized = Vec::with_capacity(bytes.len() / from as usize * to as usize);
    for line in bytes.chunks_exact(3 * from as usize) {
        for tap in &taps {
            let pixels = line[3 * tap.start..].chunks_exact(3);
            resized.extend_from_slice(&weigh(tap, pixels.map(|pixel| [pixel[0], pixel[1], pixel[2]])));
        }
    }
    resized
}

/// Every one of `width` columns of `from` pixels with `to` pixels.
fn along_columns(bytes: &[u8], width: u32, from: u32, to: u32, filter: Filter) -> Vec<u8> {
    let stride = 3 * width as usize;
    let mut resized = Vec::with_capacity(stride * to as usize);
    for tap in taps(from as usize, to as usize, filter) {
        let lines = &bytes[stride * tap.start..];
        for column in (0..stride).step_by(3) {
            let pixels = lines.chunks_exact(stride).map(|line| [0, 1, 2].map(|c| line[column + c]));
            resized.extend_from_slice(&weigh(&tap, pixels));
        }
    }
    resized
}

/// The old pixels that a new one is made of.
struct Tap {
    start: usize,
    weights: Vec<i32>, // in 1 / 2^22, their sum about 1
}

const PRECISION: u32 = 22;

/// For each of `new` pixels, the `old` ones under the filter around its centre, widened when shrinking.
fn taps(old: usize, new: usize, filter: Filter) -> Vec<Tap> {
    let scale = old as f64 / new as f64;
    let stretch = scale.max(1.0);
    let support = filter.support() * stretch;
    let tap = |i: usize| {
        let centre = (i as f64 + 0.5) * scale;
        let start = (centre - support + 0.5).max(0.0) as usize;
        let end = ((centre + support + 0.5) as usize).min(old);
        let weights: Vec<f64> = (start..end).map(|at| filter.at((at as f64 - centre + 0.5) / stretch)).collect();
        let sum: f64 = weights.iter().sum();
        let fixed = |weight: &f64| (weight / sum * f64::from(1 << PRECISION)).round() as i32;
        Tap { start, weights: weights.iter().map(fixed).collect() }
    };
    (0..new).map(tap).collect()
}

/// The weighted sum of pixels, rounded to bytes.
fn weigh(tap: &Tap, pixels: impl Iterator<Item = [u8; 3]>) -> [u8; 3] {
    let mut sums = [1i32 << (PRECISION - 1); 3];
    for (weight, pixel) in tap.weights.iter().zip(pixels) {
        for (sum, byte) in sums.iter_mut().zip(pixel) {
            *sum += weight * i32::from(byte);
        }
    }
    sums.map(|sum| (sum >> PRECISION).clamp(0, 255) as u8)
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

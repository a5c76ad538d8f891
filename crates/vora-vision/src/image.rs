//! Bytes of a picture file -> RGB pixels, or one clear reason why not.

use std::io::Cursor;
use std::path::Path;

use anyhow::{Context, Result};
use image::metadata::Orientation;
use image::{DynamicImage, ImageBuffer, ImageDecoder, ImageFormat, ImageReader, Limits, Pixel, RgbImage};
use thiserror::Error;

/// Pictures of more pixels than this are refused from their header, as Pillow refuses them.
pub const MAX_PIXELS: u64 = 178_956_970;

/// Why a picture could not be decoded; comes out of [`decode_image`] by `downcast_ref`.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ImageError {
    /// No known signature at the start of the file.
    #[error("not a picture: the file starts like none of JPEG, PNG, GIF, WebP or BMP")]
    NotAnImage,
    /// A format, or a feature of one, that is not decoded here.
    #[error("{0}; JPEG, PNG, GIF, WebP and BMP pictures can be read")]
    Unsupported(String),
    /// A decompression bomb, or a picture too large to be meant.
    #[error("the picture is {width} x {height} pixels, more than the limit of {MAX_PIXELS} pixels")]
    TooLarge {
        /// As the header says.
        width: u32,
        /// As the header says.
        height: u32,
    },
    /// The decoder asked for more memory than a picture within the limit needs.
    #[error("decoding the picture needs more memory than a picture of {MAX_PIXELS} pixels may")]
    TooMuchMemory,
    /// The file ends before its picture does.
    #[error("the {0} picture is truncated: the file ends before the picture does")]
    Truncated(&'static str),
    /// The file contradicts its format.
    #[error("the {format} picture is broken: {reason}")]
    Broken {
        /// JPEG, PNG, ...
        format: &'static str,
        /// What the decoder said.
        reason: String,
    },
}

/// Reads a picture file; see [`decode_image`].
///
/// # Errors
/// With the path, and an [`ImageError`] inside where the file could be read but not decoded.
pub fn open_image(path: &Path) -> Result<RgbImage> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read picture {}", path.display()))?;
    decode_image(&bytes).with_context(|| format!("picture {}", path.display()))
}

/// Decodes JPEG, PNG, GIF (its first frame), WebP or BMP to upright RGB.
///
/// The EXIF orientation is applied. Everything becomes RGB as Pillow's `convert("RGB")` makes it: grey is repeated,
/// palettes are looked up, alpha is dropped (not blended), of 16 bits the upper 8 are kept (also of grey ones, which
/// Pillow would saturate).
///
/// # Errors
/// An [`ImageError`]. Width times height is checked before anything is decoded.
pub fn decode_image(bytes: &[u8]) -> Result<RgbImage> {
    Ok(decode(bytes)?)
}

fn decode(bytes: &[u8]) -> Result<RgbImage, ImageError> {
    let reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format().map_err(|_| ImageError::NotAnImage)?;
    let format = reader.format().ok_or(ImageError::NotAnImage)?;
    let name = match format {
        ImageFormat::Jpeg => "JPEG",
        ImageFormat::Png => "PNG",
        ImageFormat::Gif => "GIF",
        ImageFormat::WebP => "WebP",
        ImageFormat::Bmp => "BMP",
        other => return Err(ImageError::Unsupported(format!("{other:?} pictures are not supported"))),
    };
    let image = decode_as(reader, name)?;
    if format == ImageFormat::Jpeg && !jpeg_is_complete(bytes) {
        // The decoder fills what is missing with grey and says nothing.
        return Err(ImageError::Truncated(name));
    }
    Ok(image)
}

fn decode_as(mut reader: ImageReader<Cursor<&[u8]>>, name: &'static str) -> Result<RgbImage, ImageError> {
    let mut limits = Limits::no_limits();
    limits.max_alloc = Some(8 * MAX_PIXELS); // four channels of 16 bits
    reader.limits(limits);
    let reason = |error| explain(error, name);
    let mut decoder = reader.into_decoder().map_err(reason)?;
    let (width, height) = decoder.dimensions();
    if u64::from(width) * u64::from(height) > MAX_PIXELS {
        return Err(ImageError::TooLarge { width, height });
    }
    let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    let rgb = to_rgb(DynamicImage::from_decoder(decoder).map_err(reason)?);
    if orientation == Orientation::NoTransforms {
        return Ok(rgb);
    }
    let mut upright = DynamicImage::ImageRgb8(rgb);
    upright.apply_orientation(orientation);
    Ok(upright.into_rgb8())
}

fn to_rgb(image: DynamicImage) -> RgbImage {
    match image {
        DynamicImage::ImageLuma16(image) => upper_bytes(&image),
        DynamicImage::ImageLumaA16(image) => upper_bytes(&image),
        DynamicImage::ImageRgb16(image) => upper_bytes(&image),
        DynamicImage::ImageRgba16(image) => upper_bytes(&image),
        other => other.into_rgb8(),
    }
}

/// The upper 8 of 16 bits.
fn upper_bytes<P: Pixel<Subpixel = u16>>(image: &ImageBuffer<P, Vec<u16>>) -> RgbImage {
    let mut rgb = RgbImage::new(image.width(), image.height());
    for (to, from) in rgb.pixels_mut().zip(image.pixels()) {
        to.0 = from.to_rgb().0.map(|v| (v >> 8) as u8);
    }
    rgb
}

fn explain(error: image::ImageError, name: &'static str) -> ImageError {
    match error {
        image::ImageError::Limits(_) => ImageError::TooMuchMemory,
        image::ImageError::Unsupported(error) => ImageError::Unsupported(format!("{name}: {error}")),
        image::ImageError::IoError(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
            ImageError::Truncated(name)
        }
        other => {
            let reason = other.to_string();
            ImageError::Broken { format: name, reason: reason.lines().next().unwrap_or_default().to_owned() }
        }
    }
}

/// Whether the segments of a JPEG file lead to its end-of-image marker (ITU-T T.81, annex B).
fn jpeg_is_complete(bytes: &[u8]) -> bool {
    const END_OF_IMAGE: u8 = 0xd9;
    const START_OF_SCAN: u8 = 0xda;
    let mut at = 2; // behind the start-of-image marker
    loop {
        // Where entropy-coded data or padding stands, go to the next marker: 0xff, then neither 0 (a stuffed 0xff),
        // nor 0xff (fill), nor one of the restart markers that lie inside a scan.
        let Some(found) = bytes.get(at..).and_then(|rest| {
            rest.windows(2).position(|pair| pair[0] == 0xff && !matches!(pair[1], 0 | 0xff | 0xd0..=0xd7))
        }) else {
            return false;
        };
        at += found + 2;
        match bytes[at - 1] {
            END_OF_IMAGE => return true,
            0x01 | 0xd8 => {} // stand alone
            marker => {
                let Some(&[high, low]) = bytes.get(at..at + 2) else { return false };
                let length = usize::from(u16::from_be_bytes([high, low]));
                if length < 2 || (marker == START_OF_SCAN && at + length >= bytes.len()) {
                    return false;
                }
                at += length;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Kind, Tensor};

    fn read(name: &str) -> Vec<u8> {
        std::fs::read(fixtures::root().join("images").join(name)).unwrap()
    }

    fn refusal(bytes: &[u8]) -> ImageError {
        decode_image(bytes).unwrap_err().downcast_ref::<ImageError>().unwrap().clone()
    }

    /// Largest and mean difference from what Pillow decodes, `[height, width, 3]`.
    fn difference(name: &str) -> (f64, f64) {
        let golden = fixtures::open("preprocess");
        let expected = &golden[&format!("decoded.{name}")];
        let image = decode_image(&read(name)).unwrap();
        let found = Tensor::from_slice(image.as_raw()).view([i64::from(image.height()), i64::from(image.width()), 3]);
        assert_eq!(found.size(), expected.size(), "{name}");
        let difference = (found.to_kind(Kind::Float) - expected.to_kind(Kind::Float)).abs();
        (difference.max().double_value(&[]), difference.mean(Kind::Float).double_value(&[]))
    }

    #[test]
    fn decodes_as_pillow_does() {
        for name in [
            "rgb.png",
            "one.png",
            "grey.png",
            "grey_alpha.png",
            "bilevel.png",
            "palette.png",
            "rgba.png",
            "rgb16.png",
            "exif6.png",
            "frames.gif",
            "lossless.webp",
            "rgb.bmp",
        ] {
            assert_eq!(difference(name).0, 0.0, "{name}");
        }
        // Decoders of JPEG are free in how they round.
        for name in ["photo.jpg", "exif6.jpg", "grey.jpg", "progressive.jpg", "cmyk.jpg"] {
            let (largest, mean) = difference(name);
            assert!(largest <= 6.0 && mean < 0.5, "{name}: {largest}, mean {mean}");
        }
    }

    #[test]
    fn sixteen_bit_grey_keeps_its_upper_byte() {
        let image = decode_image(&read("grey16.png")).unwrap();
        let expected = &fixtures::open("preprocess")["decoded.grey16.png"]; // [height, width]: the 16 bits over 256
        let found = Tensor::from_slice(image.as_raw()).view([i64::from(image.height()), i64::from(image.width()), 3]);
        for channel in 0..3 {
            assert!(found.select(2, channel).equal(expected));
        }
    }

    #[test]
    fn a_bomb_is_refused_from_its_header() {
        assert_eq!(refusal(&read("bomb.png")), ImageError::TooLarge { width: 50_000, height: 50_000 });
        // A JPEG of a few bytes that says it is 65,500 x 65,500.
        let mut jpeg = read("photo.jpg");
        let frame = jpeg.windows(2).position(|pair| pair == [0xff, 0xc0]).unwrap();
        jpeg[frame + 5..frame + 9].copy_from_slice(&[0xff, 0xdc, 0xff, 0xdc]);
        let error = refusal(&jpeg);
        assert_eq!(error, ImageError::TooLarge { width: 65_500, height: 65_500 });
        assert!(error.to_string().contains("65500 x 65500 pixels, more than the limit of 178956970"), "{error}");
    }

    #[test]
    fn truncated_files_are_refused_wherever_they_are_cut() {
        for name in ["photo.jpg", "progressive.jpg", "exif6.jpg", "rgb.png", "frames.gif", "lossless.webp", "rgb.bmp"] {
            let bytes = read(name);
            for sixteenth in 1..16 {
                let cut = &bytes[..bytes.len() * sixteenth / 16];
                if let Ok(image) = decode_image(cut) {
                    // A picture whose last frame or metadata is cut may still be whole.
                    assert_eq!(image, decode_image(&bytes).unwrap(), "{name} cut to {} bytes", cut.len());
                    assert!(["frames.gif"].contains(&name), "{name} cut to {} bytes", cut.len());
                }
            }
        }
        let bytes = read("photo.jpg");
        assert_eq!(refusal(&bytes[..bytes.len() - 2]), ImageError::Truncated("JPEG"));
        assert_eq!(
            refusal(&bytes[..bytes.len() / 2]).to_string(),
            "the JPEG picture is truncated: the file ends before the picture does"
        );
    }

    #[test]
    fn what_is_not_a_picture_says_so() {
        for bytes in [&b""[..], b"hello", b"<html><body>404</body></html>", &[0; 4096]] {
            assert_eq!(refusal(bytes), ImageError::NotAnImage);
        }
        let tiff = refusal(b"II*\0\x08\0\0\0\0\0").to_string();
        assert!(tiff.contains("Tiff pictures are not supported; JPEG, PNG"), "{tiff}");
        let missing = format!("{:#}", open_image(Path::new("no/such.png")).unwrap_err());
        assert!(missing.contains("cannot read picture no/such.png"), "{missing}");
        let mut noise = read("rgb.png");
        for byte in &mut noise[60..] {
            *byte = byte.wrapping_mul(31).wrapping_add(7);
        }
        let broken = refusal(&noise).to_string();
        assert!(broken.starts_with("the PNG picture is") && !broken.contains("0x"), "{broken}");
    }
}

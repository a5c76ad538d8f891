//! Bytes of a picture file -> RGB pixels, or one clear reason why not.

use std::fs::File;
use std::io::{Cursor, Read};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use image::metadata::Orientation;
use image::{ColorType, DynamicImage, ImageBuffer, ImageDecoder, ImageFormat, ImageReader, Limits, Pixel, RgbImage};
use thiserror::Error;

/// Pictures of more pixels than this are refused from their header, as Pillow refuses them.
pub const MAX_PIXELS: u64 = 178_956_970;

/// The file of a picture is no larger: 256 MiB.
pub const MAX_FILE: u64 = 256 << 20;

/// All that decoding one picture holds at once: its file, the decoder's own buffers, the pixels as the file has them and
/// as RGB. Together with a window of records it stays within 1 GiB.
const MAX_DECODED: u64 = 704 << 20;

/// Why a picture could not be decoded; found in the error of [`decode_image`] by `downcast_ref`.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ImageError {
    /// No known signature at the start of the file.
    #[error("not a picture: the file starts like none of JPEG, PNG, GIF, WebP, BMP, TIFF or PNM")]
    NotAnImage,
    /// A format, or a feature of one, that is not decoded here.
    #[error("{0}; JPEG, PNG, GIF, WebP, BMP, TIFF and PNM pictures can be read")]
    Unsupported(String),
    /// A decompression bomb, or a picture too large to be meant.
    #[error("the picture is {width} x {height} pixels, more than the limit of {MAX_PIXELS} pixels")]
    TooLarge {
        /// As the header says.
        width: u32,
        /// As the header says.
        height: u32,
    },
    /// What decoding it would hold at once is more than one picture may take.
    #[error("decoding the picture needs more than {} MiB of memory", MAX_DECODED >> 20)]
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
    let bytes = read_image(path).with_context(|| format!("cannot read picture {}", path.display()))?;
    decode_image(&bytes).with_context(|| format!("picture {}", path.display()))
}

/// The bytes of a picture's file, undecoded. A device would go on for ever, and a pipe or a terminal might never begin:
/// pictures are regular files.
///
/// # Errors
/// Where it is no regular file, cannot be read, or has more than [`MAX_FILE`] bytes.
pub fn read_image(path: &Path) -> Result<Vec<u8>> {
    let kind = std::fs::metadata(path)?;
    ensure!(kind.is_file(), "it is not a file but {}", if kind.is_dir() { "a folder" } else { "a device or a pipe" });
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_FILE + 1).read_to_end(&mut bytes)?;
    ensure!(bytes.len() as u64 <= MAX_FILE, "it has more than {} MiB", MAX_FILE >> 20);
    Ok(bytes)
}

/// Whether a file that begins like this is a picture, one that [`decode_image`] reads or one that it refuses by name.
/// Twelve bytes are enough to tell.
pub fn is_image(start: &[u8]) -> bool {
    signature(start).is_some()
}

/// What a file is by its first bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Signature {
    Read(ImageFormat, &'static str),
    Refused(&'static str),
}

fn signature(start: &[u8]) -> Option<Signature> {
    use Signature::{Read, Refused};
    Some(match start {
        [0xff, 0xd8, 0xff, ..] => Read(ImageFormat::Jpeg, "JPEG"),
        [0x89, b'P', b'N', b'G', b'\r', b'\n', 0x1a, b'\n', ..] => Read(ImageFormat::Png, "PNG"),
        [b'G', b'I', b'F', b'8', b'7' | b'9', b'a', ..] => Read(ImageFormat::Gif, "GIF"),
        [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'E', b'B', b'P', ..] => Read(ImageFormat::WebP, "WebP"),
        [b'B', b'M', _, _, _, _, 0, 0, 0, 0, ..] => Read(ImageFormat::Bmp, "BMP"),
        [b'I', b'I', b'*', 0, ..] | [b'M', b'M', 0, b'*', ..] => Read(ImageFormat::Tiff, "TIFF"),
        [b'P', b'1'..=b'7', space, ..] if space.is_ascii_whitespace() || *space == b'#' => {
            Read(ImageFormat::Pnm, "PNM")
        }
        [b'I', b'I', b'+', 0, ..] | [b'M', b'M', 0, b'+', ..] => Refused("BigTIFF"),
        [_, _, _, _, b'f', b't', b'y', b'p', brand @ ..] => match brand.get(..4)? {
            b"avif" | b"avis" => Refused("AVIF"),
            b"heic" | b"heix" | b"hevc" | b"hevx" | b"heim" | b"heis" | b"mif1" | b"msf1" => Refused("HEIC"),
            _ => return None, // a video, as a rule
        },
        [0xff, 0x0a, ..] | [0, 0, 0, 0x0c, b'J', b'X', b'L', b' ', ..] => Refused("JPEG XL"),
        [0, 0, 0, 0x0c, b'j', b'P', b' ', b' ', ..] | [0xff, 0x4f, 0xff, 0x51, ..] => Refused("JPEG 2000"),
        [b'8', b'B', b'P', b'S', ..] => Refused("Photoshop"),
        [b'q', b'o', b'i', b'f', ..] => Refused("QOI"),
        [b'D', b'D', b'S', b' ', ..] => Refused("DDS"),
        [0, 0, 1, 0, count, 0, ..] if *count > 0 => Refused("ICO"),
        [b'#', b'?', b'R', b'A', b'D', b'I', b'A', b'N', ..] => Refused("Radiance HDR"),
        [0x76, 0x2f, 0x31, 0x01, ..] => Refused("OpenEXR"),
        _ => return None,
    })
}

/// Width and height that a picture's header tells, before it is turned upright; nothing is decoded.
///
/// # Errors
/// An [`ImageError`], where the header is none that [`decode_image`] reads.
pub fn dimensions(bytes: &[u8]) -> Result<(u32, u32)> {
    match signature(bytes).ok_or(ImageError::NotAnImage)? {
        Signature::Read(format, name) => {
            let reader = ImageReader::with_format(Cursor::new(bytes), format);
            Ok(reader.into_dimensions().map_err(|error| explain(error, name))?)
        }
        Signature::Refused(name) => Err(ImageError::Unsupported(format!("{name} pictures are not supported")).into()),
    }
}

/// Decodes JPEG, PNG, GIF (its first frame), WebP, BMP, TIFF (its first page) or PNM to upright RGB.
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
    let (format, name) = match signature(bytes).ok_or(ImageError::NotAnImage)? {
        Signature::Read(format, name) => (format, name),
        Signature::Refused(name) => return Err(ImageError::Unsupported(format!("{name} pictures are not supported"))),
    };
    let image = decode_as(bytes, format, name)?;
    if format == ImageFormat::Jpeg && !jpeg_is_complete(bytes) {
        // The decoder fills what is missing with grey and says nothing.
        return Err(ImageError::Truncated(name));
    }
    Ok(image)
}

fn decode_as(bytes: &[u8], format: ImageFormat, name: &'static str) -> Result<RgbImage, ImageError> {
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
    let mut limits = Limits::no_limits();
    limits.max_alloc = Some(MAX_DECODED);
    reader.limits(limits);
    let reason = |error| explain(error, name);
    let mut decoder = reader.into_decoder().map_err(reason)?;
    let (width, height) = decoder.dimensions();
    let pixels = u64::from(width) * u64::from(height);
    if pixels > MAX_PIXELS {
        return Err(ImageError::TooLarge { width, height });
    }
    // Beside the pixels as they come, and as RGB where they come otherwise or are turned.
    let own = match format {
        ImageFormat::Jpeg if is_progressive(bytes) => bytes.len() as u64 + 6 * pixels, // three coefficients of 16 bits
        ImageFormat::Jpeg => bytes.len() as u64,
        ImageFormat::WebP | ImageFormat::Gif => 2 * pixels,
        ImageFormat::Tiff => decoder.total_bytes(), // a copy
        _ => 0,
    };
    let orientation = orientation(&mut decoder);
    let turned = orientation != Orientation::NoTransforms;
    let again = if turned || decoder.color_type() != ColorType::Rgb8 { 3 * pixels } else { 0 };
    if bytes.len() as u64 + own + decoder.total_bytes() + again > MAX_DECODED {
        return Err(ImageError::TooMuchMemory);
    }
    let rgb = to_rgb(DynamicImage::from_decoder(decoder).map_err(reason)?);
    if orientation == Orientation::NoTransforms {
        return Ok(rgb);
    }
    let mut upright = DynamicImage::ImageRgb8(rgb);
    upright.apply_orientation(orientation);
    Ok(upright.into_rgb8())
}

/// How the picture is to be turned. EXIF data begin with their own name in files that Pillow wrote as an animation, where the
/// decoder takes them for none.
fn orientation(decoder: &mut impl ImageDecoder) -> Orientation {
    let found = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    if found != Orientation::NoTransforms {
        return found;
    }
    let exif = decoder.exif_metadata().ok().flatten();
    let named = exif.as_deref().and_then(|exif| exif.strip_prefix(b"Exif\0\0"));
    named.and_then(Orientation::from_exif_chunk).unwrap_or(found)
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

/// Whether a JPEG file's frame is progressive: its coefficients are all kept until its last scan.
fn is_progressive(bytes: &[u8]) -> bool {
    let mut at = 2;
    while let Some(&[0xff, marker, high, low]) = bytes.get(at..at + 4) {
        match marker {
            0xc2 | 0xc6 | 0xca | 0xce => return true,
            0xc0 | 0xc1 | 0xda => return false,
            0xff => at += 1, // fill
            _ => at += 2 + usize::from(u16::from_be_bytes([high, low])),
        }
    }
    true // it does not say
}

/// Whether the segments of a JPEG file lead to its end-of-image marker (ITU-T T.81, annex B).
fn jpeg_is_complete(bytes: &[u8]) -> bool {
    const END_OF_IMAGE: u8 = 0xd9;
    const START_OF_SCAN: u8 = 0xda;
    let mut at = 2; // after the start-of-image marker
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
    use fixtures::Difference;
    use image::ImageEncoder;

    fn read(name: &str) -> Vec<u8> {
        std::fs::read(fixtures::root().join("images").join(name)).unwrap()
    }

    fn refusal(bytes: &[u8]) -> ImageError {
        decode_image(bytes).unwrap_err().downcast_ref::<ImageError>().unwrap().clone()
    }

    /// From what Pillow decodes, `[height, width, 3]`.
    fn difference(name: &str) -> Difference {
        let image = decode_image(&read(name)).unwrap();
        let shape = [image.height() as usize, image.width() as usize, 3];
        fixtures::arrays("preprocess")[&format!("decoded.{name}")].difference(&shape, image.into_raw())
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
            assert_eq!(difference(name).largest, 0.0, "{name}");
        }
        // Decoders of JPEG are free in how they round.
        for name in ["photo.jpg", "exif6.jpg", "grey.jpg", "progressive.jpg", "cmyk.jpg"] {
            let Difference { largest, mean } = difference(name);
            assert!(largest <= 6.0 && mean < 0.5, "{name}: {largest}, mean {mean}");
        }
    }

    #[test]
    fn sixteen_bit_grey_keeps_its_upper_byte() {
        let image = decode_image(&read("grey16.png")).unwrap();
        let expected = fixtures::arrays("preprocess")["decoded.grey16.png"].bytes(); // [height, width]: the 16 bits over 256
        assert!(image.pixels().map(|pixel| pixel.0).eq(expected.into_iter().map(|byte| [byte; 3])));
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
    fn tiff_and_pnm_are_read_by_their_first_bytes() {
        let picture = decode_image(&read("rgb.png")).unwrap();
        for format in [ImageFormat::Tiff, ImageFormat::Pnm] {
            let mut bytes = Cursor::new(Vec::new());
            picture.write_to(&mut bytes, format).unwrap();
            assert!(is_image(&bytes.get_ref()[..12]));
            assert!(decode_image(bytes.get_ref()).unwrap() == picture, "{format:?}");
        }
        // One bit, plain text, sixteen bits, and a largest value that is not 255, as Pillow reads them.
        assert_eq!(decode_image(b"P1\n2 1\n1 0\n").unwrap().into_raw(), [0, 0, 0, 255, 255, 255]);
        assert_eq!(decode_image(b"P3 1 1 255 1 2 3\n").unwrap().into_raw(), [1, 2, 3]);
        assert_eq!(decode_image(b"P5 1 1 100\n\x32").unwrap().into_raw(), [128; 3]);
    }

    #[test]
    fn a_picture_is_a_regular_file() {
        let folder = tempfile::tempdir().unwrap();
        assert!(format!("{:#}", open_image(folder.path()).unwrap_err()).contains("it is not a file but a folder"));
        #[cfg(unix)]
        {
            let message = format!("{:#}", open_image(Path::new("/dev/zero")).unwrap_err());
            assert!(message.contains("cannot read picture /dev/zero: it is not a file but a device"), "{message}");
        }
        let large = folder.path().join("large.png");
        File::create(&large).unwrap().set_len(MAX_FILE + 1).unwrap(); // zeros, which take no room on the disk
        assert!(format!("{:#}", open_image(&large).unwrap_err()).contains("it has more than 256 MiB"));
    }

    #[test]
    fn what_decoding_would_hold_is_bounded() {
        // 170 million pixels are few enough, four channels of 16 bits of them are too much.
        let mut header = Vec::new();
        image::codecs::png::PngEncoder::new(&mut header)
            .write_image(&[0; 8], 1, 1, image::ExtendedColorType::Rgba16)
            .unwrap();
        header[16..20].copy_from_slice(&17_000_u32.to_be_bytes());
        header[20..24].copy_from_slice(&10_000_u32.to_be_bytes());
        let checksum = crc32(&header[12..29]);
        header[29..33].copy_from_slice(&checksum.to_be_bytes());
        assert_eq!(refusal(&header), ImageError::TooMuchMemory);
    }

    fn crc32(bytes: &[u8]) -> u32 {
        !bytes.iter().fold(u32::MAX, |crc, byte| {
            (0..8).fold(crc ^ u32::from(*byte), |crc, _| crc >> 1 ^ if crc & 1 == 1 { 0xedb8_8320 } else { 0 })
        })
    }

    #[test]
    fn what_is_not_a_picture_says_so() {
        for bytes in [&b""[..], b"hello", b"<html><body>404</body></html>", &[0; 4096]] {
            assert_eq!(refusal(bytes), ImageError::NotAnImage);
        }
        for (start, name) in [
            (&b"\0\0\0\x1cftypavif\0\0\0\0"[..], "AVIF"),
            (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC"),
            (b"\0\0\0\x18ftypmif1\0\0\0\0", "HEIC"),
            (b"\xff\x0a\xfa\x1f", "JPEG XL"),
            (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
        ] {
            let refused = refusal(start).to_string();
            assert!(refused.contains(&format!("{name} pictures are not supported; JPEG, PNG")), "{refused}");
            assert!(is_image(start));
        }
        assert!(!is_image(b"\0\0\0\x18ftypmp42\0\0\0\0")); // a video
        let missing = format!("{:#}", open_image(Path::new("no/such.png")).unwrap_err());
        assert!(missing.contains("cannot read picture no/such.png"), "{missing}");
        let mut noise = read("rgb.png");
        for byte in &mut noise[60..] {
            *byte = byte.wrapping_mul(31).wrapping_add(7);
        }
        let broken = refusal(&noise).to_string();
        assert!(broken.starts_with("the PNG picture is") && !broken.contains("0x"), "{broken}");
    }

    /// A WebP whose EXIF data say that it lies on its side, without and with the name that Pillow writes before them in
    /// animations.
    #[test]
    fn exif_data_with_their_name_before_them_turn_a_picture() {
        let plain = std::fs::read(fixtures::root().join("images/lossless.webp")).unwrap();
        let upright = decode_image(&plain).unwrap();
        let tiff = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0";
        for exif in [tiff.to_vec(), [b"Exif\0\0".as_slice(), tiff].concat()] {
            let mut header = vec![0x08, 0, 0, 0]; // it has EXIF data
            for side in [upright.width(), upright.height()] {
                header.extend_from_slice(&(side - 1).to_le_bytes()[..3]);
            }
            let mut body = b"WEBP".to_vec();
            for (name, chunk) in [(b"VP8X", header.as_slice()), (b"EXIF", &exif)] {
                if name == b"EXIF" {
                    body.extend_from_slice(&plain[12..]);
                }
                body.extend_from_slice(name);
                body.extend_from_slice(&(chunk.len() as u32).to_le_bytes());
                body.extend_from_slice(chunk);
            }
            let file = [b"RIFF".as_slice(), &(body.len() as u32).to_le_bytes(), &body].concat();
            let turned = decode_image(&file).unwrap();
            assert_eq!(turned, image::imageops::rotate90(&upright));
        }
    }
}

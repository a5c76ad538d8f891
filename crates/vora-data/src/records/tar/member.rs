//! One member of a shard: its name's halves, and what it is for.

use std::cmp::Ordering;
use std::io::Read;

use anyhow::{Result, ensure};

use crate::records::conversations::BYTE_ORDER_MARK;
use crate::records::limits::{MAX_LINE, MAX_RECORD};

/// Endings of pictures: what has one of them and does not begin like a picture is a broken one.
const PICTURES: [&str; 16] = [
    "jpg", "jpeg", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "pbm", "pnm", "avif", "heic",
    "jxl",
];

/// Endings of videos.
const VIDEOS: [&str; 8] = ["mp4", "m4v", "mov", "mkv", "webm", "avi", "mpg", "mpeg"];

/// What a member is for.
pub(super) enum Part {
    Json(Vec<u8>),
    Text(Vec<u8>),
    Image(Vec<u8>),
    Other,
    /// Why the record is none.
    Fault(String),
}

/// By what a member's name has after its record's.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Ending {
    Json,
    Text,
    Image,
    Video,
    Other,
}

impl Ending {
    pub(super) fn of(suffix: &str) -> Self {
        match suffix.rsplit('.').next().unwrap_or_default() {
            "json" | "jsn" => Self::Json,
            "txt" | "text" | "transcript" => Self::Text,
            ending if PICTURES.contains(&ending) => Self::Image,
            ending if VIDEOS.contains(&ending) => Self::Video,
            _ => Self::Other,
        }
    }

    pub(super) fn is_words(self) -> bool {
        matches!(self, Self::Json | Self::Text)
    }
}

impl Part {
    /// Reads a member of `size` bytes, of which its record may have `left`.
    pub(super) fn read(suffix: &str, size: u64, left: &mut u64, file: &mut impl Read) -> Result<Self> {
        let mut bytes = Vec::new();
        file.by_ref().take(size.min(16)).read_to_end(&mut bytes)?;
        let ending = match Ending::of(suffix) {
            Ending::Other if vora_image::is_image(&bytes) => Ending::Image,
            ending => ending,
        };
        let (most, make): (u64, fn(Vec<u8>) -> Self) = match ending {
            Ending::Json => (MAX_LINE, Self::Json),
            Ending::Text => (MAX_LINE, Self::Text),
            Ending::Image => (MAX_RECORD, Self::Image),
            Ending::Video => return Ok(Self::Fault(format!("its .{suffix} is a video, which is not read yet"))),
            Ending::Other => return Ok(Self::Other),
        };
        if size > most {
            return Ok(Self::Fault(format!("its .{suffix} has more than {} MiB", most >> 20)));
        }
        if size > *left {
            return Ok(Self::Fault(format!("its members have more than {} MiB together", MAX_RECORD >> 20)));
        }
        *left -= size;
        bytes.reserve_exact(size as usize - bytes.len());
        file.take(size - bytes.len() as u64).read_to_end(&mut bytes)?;
        ensure!(bytes.len() as u64 == size, "its .{suffix} is cut short");
        if ending.is_words() && bytes.starts_with(BYTE_ORDER_MARK) {
            bytes.drain(..BYTE_ORDER_MARK.len());
        }
        Ok(make(bytes))
    }
}

/// `train/a.0.PNG` -> `train/a`, `0.png`. A base name that begins with a dot is nobody's: `._a.png` holds what a Mac
/// knows of `a.png`.
pub(super) fn split(path: &str) -> Option<(&str, String)> {
    let base = path.rfind('/').map_or(0, |slash| slash + 1);
    let dot = base + path[base..].find('.').filter(|dot| *dot > 0)?;
    let first = path.split('/').next().unwrap_or_default();
    let is_meta = first.len() >= 4 && first.starts_with("__") && first.ends_with("__");
    (!is_meta).then(|| (&path[..dot], path[dot + 1..].to_lowercase()))
}

/// `2.png` before `10.png`: runs of digits compare as numbers.
pub(super) fn natural(a: &str, b: &str) -> Ordering {
    let digits = |text: &str| text.bytes().take_while(u8::is_ascii_digit).count();
    let (mut rest, mut other) = (a, b);
    loop {
        let (len, other_len) = (digits(rest), digits(other));
        if len > 0 && other_len > 0 {
            let number = |text: &str, len: usize| text[..len].trim_start_matches('0').to_owned();
            let (x, y) = (number(rest, len), number(other, other_len));
            let order = x.len().cmp(&y.len()).then_with(|| x.cmp(&y));
            if order != Ordering::Equal {
                return order;
            }
            (rest, other) = (&rest[len..], &other[other_len..]);
            continue;
        }
        let (mut chars, mut others) = (rest.chars(), other.chars());
        match (chars.next(), others.next()) {
            (Some(x), Some(y)) if x == y => (rest, other) = (chars.as_str(), others.as_str()),
            (None, None) => return a.cmp(b),
            (x, y) => return x.cmp(&y),
        }
    }
}

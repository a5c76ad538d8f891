//! A request's pictures: fetched where that is allowed, decoded, counted.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use vora_image::{ImageError, RgbImage, decode_image, dimensions};

use super::messages::PictureSource;
use crate::error::ApiError;
use crate::fetch::Fetcher;

/// The bytes of a picture's file: those of a `data:` address, or fetched.
///
/// # Errors
/// Names the field.
pub(super) fn read(source: &PictureSource, fetcher: &Fetcher) -> Result<Vec<u8>, ApiError> {
    let PictureSource { param, url } = source;
    let wrong = |what: String| ApiError::invalid(param, what);
    let Some(data) = url.strip_prefix("data:") else {
        return fetcher.fetch(url).map_err(|error| wrong(error.to_string()));
    };
    let (head, data) = data.split_once(',').ok_or_else(|| wrong("the data address has no comma".to_owned()))?;
    if !head.ends_with(";base64") {
        return Err(wrong("the data address of a picture has to be base64".to_owned()));
    }
    STANDARD.decode(data.trim_end()).map_err(|_| wrong("the data address is not base64".to_owned()))
}

/// Decodes pictures of at most `max_pixels` together; their sizes are looked at before any of them is decoded.
///
/// # Errors
/// Names the field.
pub(super) fn decode(files: &[(String, Vec<u8>)], max_pixels: u64) -> Result<Vec<RgbImage>, ApiError> {
    let mut pixels = 0;
    for (param, bytes) in files {
        // One whose header cannot be read is refused below, by what is wrong with it.
        let (width, height) = dimensions(bytes).unwrap_or_default();
        pixels += u64::from(width) * u64::from(height);
        if pixels > max_pixels {
            let what = format!("the pictures have more than {max_pixels} pixels together, up to this one");
            return Err(ApiError::invalid(param, what));
        }
    }
    files.iter().map(|(param, bytes)| decode_image(bytes).map_err(|error| refusal(param, &error))).collect()
}

fn refusal(param: &str, error: &anyhow::Error) -> ApiError {
    let what =
        error.downcast_ref::<ImageError>().map_or_else(|| "it cannot be decoded".to_owned(), ToString::to_string);
    ApiError::invalid(param, format!("the picture cannot be used: {what}"))
}

//! The images that records of JSON name, in a folder that no name leads out of.

use std::fs;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, ensure};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;

use super::frames::short_name;
use crate::error::DataError;

/// A folder of images, its path without links or dots; none for text alone.
#[derive(Debug)]
pub(crate) struct ImageFolder(Option<PathBuf>);

impl ImageFolder {
    /// The folder at `path`, none where that is empty.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let folder = (!path.as_os_str().is_empty()).then(|| {
            fs::canonicalize(path).with_context(|| format!("cannot read the image folder {}", path.display()))
        });
        Ok(Self(folder.transpose()?))
    }

    /// Reads the file of a record's image, undecoded.
    ///
    /// # Errors
    /// Where the path leaves the image folder, by `..`, by a root elsewhere or by a link; where the file is missing, no
    /// ordinary file, or larger than an image may be. Links may lead to what lies beside the image folder, and to what
    /// the hub's client keeps.
    pub(crate) fn read(&self, frame: &str) -> Result<Vec<u8>> {
        if let Some(data) = frame.strip_prefix("data:") {
            let (_, data) = data.split_once("base64,").context("an image is a `data:` address, but not of base64")?;
            let data: String = data.split_ascii_whitespace().collect(); // some break lines
            return BASE64.decode(data).context("an image is no base64");
        }
        let path = self.path(frame)?;
        vora_image::read_image(&path).with_context(|| format!("cannot read image `{}`", short_name(frame)))
    }

    /// Whether a record's image is there: what [`Self::read`] says of its name, without reading the file.
    ///
    /// # Errors
    /// Where the path leaves the image folder, or the file is missing or no ordinary one.
    pub(crate) fn find(&self, frame: &str) -> Result<()> {
        if !frame.starts_with("data:") {
            self.path(frame)?;
        }
        Ok(())
    }

    fn path(&self, frame: &str) -> Result<PathBuf> {
        let shown = short_name(frame);
        let is_whole = Path::new(frame).is_absolute();
        let inside = Path::new(frame).components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
        ensure!(is_whole || inside && !frame.is_empty(), "image `{shown}` does not lie in the image folder");
        let folder = self.0.as_ref();
        let folder = folder.with_context(|| format!("image `{shown}` of a source without an image folder"))?;
        if is_whole {
            // Of what lies elsewhere not even whether it is there is told.
            let path = fs::canonicalize(frame).ok().filter(|path| path.starts_with(folder) && path.is_file());
            return path.with_context(|| {
                format!(
                    "image `{shown}` is a whole path and does not lie in the image folder {}: name it from there, or give a \
                     folder above it as image folder",
                    folder.display()
                )
            });
        }
        let path = fs::canonicalize(folder.join(frame)).map_err(|source| {
            let (name, folder) = (shown.to_string(), folder.clone());
            DataError::NoImage { name, folder, source }
        })?;
        ensure!(
            path.starts_with(folder) || is_beside(&path, folder) || is_blob(&path),
            "image `{shown}` is a link out of the image folder"
        );
        ensure!(path.is_file(), "image `{shown}` is not a file");
        Ok(path)
    }
}

/// Whether a file lies in the folder that the image folder lies in.
fn is_beside(path: &Path, folder: &Path) -> bool {
    folder.parent().is_some_and(|parent| parent.parent().is_some() && path.starts_with(parent))
}

/// Whether a file is one that the hub's client keeps: `datasets--owner--name/blobs/HASH`; its folders of snapshots are
/// made of links to such.
fn is_blob(path: &Path) -> bool {
    let blobs = path.parent().filter(|blobs| blobs.ends_with("blobs"));
    let repository = blobs.and_then(Path::parent).and_then(Path::file_name).and_then(|name| name.to_str());
    repository.is_some_and(|name| ["datasets--", "models--", "spaces--"].iter().any(|kind| name.starts_with(kind)))
}

//! The checksums of a folder's files, as `sha256sum` writes and checks them.

use std::fs::{self, File};
use std::path::Path;

use anyhow::{Context, Result, anyhow, ensure};
use sha2::{Digest, Sha256};

use crate::write::write_bytes;

/// The file that they stand in.
pub const MANIFEST: &str = "SHA256SUMS";

/// Writes those of every file in `folder`.
///
/// # Errors
/// Where a file cannot be read or the list not written.
pub fn write(folder: &Path) -> Result<()> {
    let mut lines = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        lines.push(format!("{}  {name}\n", digest_of(&path)?));
    }
    lines.sort_by(|a, b| a[64..].cmp(&b[64..]));
    write_bytes(&folder.join(MANIFEST), lines.concat().as_bytes())
}

/// Compares every file that a folder's checksums name, and returns their names; a folder without checksums has none.
///
/// # Errors
/// Names the first file that differs, and where the list is not whole.
pub fn verify(folder: &Path) -> Result<Vec<String>> {
    let manifest = folder.join(MANIFEST);
    if !manifest.is_file() {
        return Ok(Vec::new());
    }
    let text = fs::read(&manifest).with_context(|| format!("cannot read {}", manifest.display()))?;
    let text = String::from_utf8_lossy(&text);
    let mut listed = Vec::new();
    for line in text.lines() {
        let (expected, name) = line
            .split_once("  ")
            .ok_or_else(|| anyhow!("{} has a line that is no checksum: `{line}`", manifest.display()))?;
        ensure!(!name.contains(['/', '\\']), "{} names a file outside: `{name}`", manifest.display());
        let path = folder.join(name);
        let found = digest_of(&path)?;
        ensure!(found == expected, "checksum mismatch: {} has {found}, {MANIFEST} says {expected}", path.display());
        listed.push(name.to_owned());
    }
    ensure!(text.ends_with('\n'), "{} is not a whole list of a checkpoint's files", manifest.display());
    Ok(listed)
}

/// SHA-256 of bytes that are at hand, in hex.
pub fn of(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn digest_of(path: &Path) -> Result<String> {
    let mut digest = Sha256::new();
    let mut file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    std::io::copy(&mut file, &mut digest).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(hex(&digest.finalize()))
}

fn hex(digest: &[u8]) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

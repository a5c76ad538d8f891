//! Small files that would take gigabytes: reading any data set stays within 1 GiB above what the program takes anyway.

use std::io::Write;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use flate2::{Compression, write::GzEncoder};

use super::{program, text};

/// The most memory, in MiB, that `vora data show` of this file ever had, as Linux counts it; and what it said.
fn peak(path: &Path, count: usize) -> (u64, String) {
    let data = format!("data={{train: {{data_fetch: {{data_paths: [{{anno_path: {}}}]}}}}}}", path.display());
    let count = count.to_string();
    let args = ["data", "show", "crates/vora-train/recipes/smoke.yaml", "--json", "--count", &count, "--set", &data];
    let mut child = program().args(args).stdout(Stdio::piped()).spawn().expect("vora starts");
    let status = format!("/proc/{}/status", child.id());
    let mut peak = 0;
    while child.try_wait().unwrap().is_none() {
        let status = std::fs::read_to_string(&status).unwrap_or_default();
        let highest = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib = highest.and_then(|line| line.trim().strip_suffix(" kB")).and_then(|kib| kib.parse::<u64>().ok());
        peak = kib.map_or(peak, |kib| kib >> 10);
        std::thread::sleep(Duration::from_millis(5));
    }
    (peak, text(&child.wait_with_output().unwrap().stdout))
}

fn compressed(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn header(name: &str, size: usize) -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    header.set_path(name).unwrap();
    header.set_size(size as u64);
    header.set_cksum();
    header.as_bytes().to_vec()
}

/// A compressed shard of records with a caption and a picture of so many bytes, which is none beyond its first ones.
fn shard(path: &Path, records: usize, size: usize) {
    let mut picture = b"\x89PNG\r\n\x1a\n".to_vec();
    picture.resize(size, 0);
    let picture = compressed(&picture);
    let mut file = Vec::new();
    for record in 0..records {
        let mut caption = b"A cat.".to_vec();
        caption.resize(512, 0);
        file.extend(compressed(&[header(&format!("{record}.txt"), 6), caption].concat()));
        file.extend(compressed(&header(&format!("{record}.png"), size)));
        file.extend(&picture); // parts of a file that are compressed each for itself are one file
    }
    file.extend(compressed(&[0; 1024]));
    std::fs::write(path, file).unwrap();
}

#[test]
#[cfg(target_os = "linux")]
fn small_files_do_not_take_gigabytes() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    shard(&path("small.tar.gz"), 2, 512);
    let (usual, _) = peak(&path("small.tar.gz"), 2);
    shard(&path("shard.tar.gz"), 40, 40 << 20);
    assert!(std::fs::metadata(path("shard.tar.gz")).unwrap().len() < 10 << 20);
    let (shard, said) = peak(&path("shard.tar.gz"), 40);
    assert_eq!(said.matches("record `").count(), 40, "{said}");
    // One text of 1 MiB, 1500 times.
    let (texts, _) = peak(&fixtures::root().join("golden/record_files/dictionary.parquet"), 1);
    for (name, peak) in [("shard", shard), ("texts", texts)] {
        assert!(peak > 0 && peak < usual + 1024, "{name}: {peak} MiB, {usual} MiB without");
    }
}

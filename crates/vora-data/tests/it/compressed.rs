//! Files of records that somebody compressed.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Result;
use vora_data::{Conversations, Preparation, RecordFiles, RecordKeys, SampleMaker, Source};
use vora_image::{IMAGENET_DEFAULT, ImageProcessor, Resample};
use vora_text::{ChatTemplate, Tokenizer};

fn open(path: PathBuf) -> Result<Vec<Arc<dyn Source>>> {
    let folder = fixtures::root().join("tiny/tokenizer");
    let (mean, std) = IMAGENET_DEFAULT;
    let processor = ImageProcessor::square(8, mean, std, Resample::Bicubic);
    let (tokenizer, chat) = (Tokenizer::open(&folder)?, ChatTemplate::open(&folder)?);
    let maker = SampleMaker::new(Preparation::new(tokenizer, chat, i64::MAX, processor, 4)?);
    RecordFiles { path, image_folder: PathBuf::new(), keys: RecordKeys::default() }.open(&Arc::new(maker))
}

/// Whatever they are called, and in a folder beside others too.
#[test]
fn they_are_read_or_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let line = r#"{"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "Yes."}]}"#;
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(line.as_bytes()).unwrap();
    let gzip = gzip.finish().unwrap();
    fs::write(folder.path().join("a.jsonl"), line).unwrap();
    assert_eq!(open(folder.path().to_owned()).unwrap().len(), 1);
    for (name, bytes, said) in [
        ("b.jsonl.gz", &gzip[..], "(gzip), and of compressed files only tar.gz is read"),
        ("b.json", &gzip, "b.json is compressed (gzip)"),
        ("b.jsonl.xz", b"\xfd7zXZ\0\0", "(xz), and of compressed files only tar.gz is read"),
        ("b.tar.zst", b"\x28\xb5\x2f\xfd\0", "(Zstandard)"),
        ("b.tar.bz2", b"BZh91AY&SY", "`bunzip2 "),
        ("b.jsonl.zip", b"PK\x03\x04..", "(zip)"),
    ] {
        let path = folder.path().join(name);
        fs::write(&path, bytes).unwrap();
        for opened in [path.clone(), folder.path().to_owned()] {
            let error = format!("{:#}", open(opened).err().unwrap());
            assert!(error.contains(name) && error.contains(said), "{error}");
        }
        // An evaluation reads JSON alone.
        let error = format!("{:#}", Conversations::open(&path, Path::new("")).unwrap_err());
        assert!(error.contains("is compressed (") && error.contains("JSON is read as it is"), "{error}");
        fs::remove_file(path).unwrap();
    }
    let shard = fixtures::root().join("golden/record_files/shard.tar.gz");
    fs::copy(shard, folder.path().join("b.tar.gz")).unwrap();
    assert_eq!(open(folder.path().to_owned()).unwrap().len(), 2);
}

use std::cmp::Ordering;
use std::fs;
use std::io::Write;
use std::sync::Arc;

use ::tar::EntryType;
use flate2::{Compression, write::GzEncoder};
use image::{ImageFormat, Rgb, RgbImage};

use super::*;
use crate::maker;
use crate::records::RecordKeys;
use crate::records::conversations::BYTE_ORDER_MARK;
use crate::records::tar::group::{MAX_EXTENDED_HEADER, MAX_NAME};
use crate::records::tar::member::{natural, split};
use crate::sources::{RecordFiles, Source};

/// Members by name, in a plain and in a compressed file.
fn open(members: &[(&str, Vec<u8>)]) -> (tempfile::TempDir, [Arc<dyn Source>; 2]) {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, bytes) in members {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        builder.append_data(&mut header, name, &bytes[..]).unwrap();
    }
    open_archive(&builder.into_inner().unwrap())
}

fn open_archive(archive: &[u8]) -> (tempfile::TempDir, [Arc<dyn Source>; 2]) {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("a.tar"), archive).unwrap();
    let mut compressed = GzEncoder::new(Vec::new(), Compression::fast());
    compressed.write_all(archive).unwrap();
    fs::write(folder.path().join("b.tar.gz"), compressed.finish().unwrap()).unwrap();
    let open = |name| {
        let (path, image_folder) = (folder.path().join(name), PathBuf::new());
        let files = RecordFiles { path, image_folder, keys: RecordKeys::default() };
        files.open(&Arc::new(maker::tests::tiny())).unwrap().remove(0)
    };
    let sources = [open("a.tar"), open("b.tar.gz")];
    (folder, sources)
}

/// A picture whose red is `20 * number`.
fn picture(number: u8, format: ImageFormat) -> Vec<u8> {
    let mut bytes = std::io::Cursor::new(Vec::new());
    RgbImage::from_pixel(8, 8, Rgb([20 * number, 0, 0])).write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

fn png(number: u8) -> Vec<u8> {
    picture(number, ImageFormat::Png)
}

fn talk(question: &str, answer: &str) -> Vec<u8> {
    let turns = serde_json::json!([{"from": "human", "value": question}, {"from": "gpt", "value": answer}]);
    serde_json::json!({ "conversations": turns }).to_string().into_bytes()
}

/// Id, numbers of the pictures, answer; or the error.
fn seen(source: &dyn Source, index: u64) -> String {
    let sample = match source.sample(index) {
        Ok(sample) => sample,
        Err(error) => return format!("{error:#}"),
    };
    let number = |pixels: &vora_image::Pixels| ((pixels.data[0] * 0.229 + 0.485) * 255.0 / 20.0).round();
    format!("{} {:?} {}", sample.id, sample.images.iter().map(number).collect::<Vec<_>>(), sample.questions[0].answer)
}

fn check(members: &[(&str, Vec<u8>)], expected: &[&str]) {
    let (_folder, sources) = open(members);
    for source in sources {
        for (index, expected) in expected.iter().enumerate() {
            let seen = seen(&*source, index as u64);
            assert!(seen.contains(expected), "`{seen}` lacks `{expected}`");
        }
    }
}

#[test]
fn pictures_stand_in_the_order_of_their_numbers() {
    let names: Vec<_> = (0..12).map(|number| format!("rec.{number}.png")).collect();
    let question = "<image>".repeat(12);
    let mut members = vec![("rec.json", talk(&question, "The last one."))];
    members.extend(names.iter().enumerate().map(|(number, name)| (name.as_str(), png(number as u8))));
    members.swap(3, 9);
    let (_folder, sources) = open(&members);
    let expected: Vec<_> = (0..12).map(|number| number as f32).collect();
    for source in sources {
        let numbers = seen(&*source, 0);
        assert_eq!(numbers, format!("rec {expected:?} The last one."));
    }
    for (before, behind) in [("2.png", "10.png"), ("02.png", "10.png"), ("10.png", "png"), ("a2.png", "a10.png")] {
        assert_eq!((natural(before, behind), natural(behind, before)), (Ordering::Less, Ordering::Greater));
    }
}

#[test]
fn names_are_split_as_webdataset_splits_them() {
    for (path, key) in [
        ("./0001.json", Some(("./0001", "json"))),
        ("a.b/0001.0.PNG", Some(("a.b/0001", "0.png"))),
        ("frame.0001.png", Some(("frame", "0001.png"))),
        ("./._0001.png", None),
        ("train/.DS_Store", None),
        ("__meta__/a.json", None),
        ("__a.b__", None),
        ("x/__meta__/a.json", Some(("x/__meta__/a", "json"))),
        ("README", None),
    ] {
        assert_eq!(split(path), key.map(|(name, suffix)| (name, suffix.to_owned())), "{path}");
    }
    // What a Mac's tar puts between.
    let mut members = Vec::new();
    for (name, bytes) in [
        ("0000.json", talk("What?", "Number 1.")),
        ("0000.png", png(1)),
        ("0001.json", talk("What?", "Number 2.")),
        ("0001.png", png(2)),
    ] {
        members.push((format!("./._{name}"), b"\x00\x05\x16\x07".to_vec()));
        members.push((format!("./{name}"), bytes));
    }
    let members: Vec<_> = members.iter().map(|(name, bytes)| (name.as_str(), bytes.clone())).collect();
    check(&members, &["0000 [1.0] Number 1.", "0001 [2.0] Number 2."]);
}

#[test]
fn a_picture_is_known_by_its_first_bytes() {
    let mut avif = b"\0\0\0\x1cftypavif\0\0\0\0".to_vec();
    avif.resize(100, 0);
    check(
        &[
            ("0.jfif", picture(1, ImageFormat::Jpeg)),
            ("0.txt", b"One.".to_vec()),
            ("1.tif", picture(2, ImageFormat::Tiff)),
            ("1.txt", b"Two.".to_vec()),
            ("2.photo", picture(3, ImageFormat::Pnm)),
            ("2.txt", b"Three.".to_vec()),
            ("3.img", avif),
            ("3.json", talk("What?", "Four.")),
            ("4.png", b"<html>".to_vec()),
            ("4.json", talk("What?", "Five.")),
            ("5.mp4", b"\0\0\0\x18ftypmp42".to_vec()),
            ("5.json", talk("What?", "Six.")),
            ("6.cls", b"3".to_vec()),
            ("6.json", talk("What?", "Seven.")),
        ],
        &[
            "0 [1.0] One.",
            "1 [2.0] Two.",
            "2 [3.0] Three.",
            "record `3`: image 0: AVIF pictures are not supported",
            "record `4`: image 0: not a picture",
            "record `5`: its .mp4 is a video, which is not read yet",
            "6 [] Seven.",
        ],
    );
}

#[test]
fn parts_that_do_not_go_together_are_bad_records() {
    let json = |text: &str| text.as_bytes().to_vec();
    check(
        &[
            ("frame.0001.png", png(1)),
            ("frame.0001.json", talk("What?", "Number 1.")),
            ("frame.0002.png", png(2)),
            ("frame.0002.json", talk("What?", "Number 2.")),
            ("twice.png", png(1)),
            ("twice.json", talk("What?", "Number 1.")),
            ("twice.png", png(2)),
            ("0001.png", png(1)),
            ("0002.cls", json("3")),
            ("0001.json", talk("What?", "Number 1.")),
            ("named.json", json(r#"{"images": ["a.png", "b.png"], "caption": "A."}"#)),
            ("named.png", png(3)),
            ("null.jpg", png(4)),
            ("null.json", json(r#"{"caption": null, "url": "u", "key": "0001", "exif": "{}"}"#)),
            ("null.txt", json("A red one.\n")),
            ("meta.json", talk("What?", "Whole.")),
            ("meta.stats.json", json("{}")),
            ("mark.json", [BYTE_ORDER_MARK, &talk("What?", "Marked.")].concat()),
            ("words.txt", [BYTE_ORDER_MARK, b"Words."].concat()),
            ("words.png", png(5)),
        ],
        &[
            "record `frame`: 2 of its members are words, `frame.0001.json` to `frame.0002.json`: a record's name ends at",
            "record `twice`: its .png comes twice",
            "record `0001`: it has no words",
            "record `0002`: it has no words: neither .json nor .txt is among its members .cls",
            "record `0001`: its words and its other members lie apart",
            "record `named`: it names 2 images, 1 lie beside it",
            "null [4.0] A red one.",
            "meta [] Whole.",
            "mark [] Marked.",
            "words [5.0] Words.",
        ],
    );
}

#[test]
fn a_mark_in_a_record_of_text_alone_is_a_word() {
    let question = "What does <image> mean in HTML?";
    let (words, picture) = (talk(question, "A picture."), talk("<image>What?", "Number 1."));
    let members = [("0.json", words.clone()), ("1.json", picture), ("1.png", png(1))];
    let (_folder, sources) = open(&members);
    for source in sources {
        let sample = source.sample(0).unwrap();
        assert_eq!((sample.images.len(), sample.questions[0].question.as_str()), (0, question));
        assert_eq!(sample.notes, ["it has a mark `<image>` and no picture: the mark is read as words"]);
        let sample = source.sample(1).unwrap();
        assert_eq!((sample.images.len(), sample.notes.len()), (1, 0));
    }
    // Where it could be a picture's: the shard has pictures apart from words, the record says that it has none, or it
    // has members that nobody reads.
    let none = String::from_utf8(words.clone()).unwrap().replacen('{', r#"{"images": [], "#, 1).into_bytes();
    for members in [
        vec![("0_view.png", png(1)), ("0.json", words.clone())],
        vec![("1.json", none), ("0.json", talk("What?", "Nothing."))],
        vec![("1.raw", b"raw".to_vec()), ("1.json", words)],
    ] {
        let (_folder, sources) = open(&members);
        for source in sources {
            let all: Vec<_> = members.iter().enumerate().map(|(index, _)| seen(&*source, index as u64)).collect();
            assert!(all.join("\n").contains("1 places `<image>` in the questions, 0 images"), "{all:?}");
        }
    }
}

#[test]
fn names_of_any_length_are_read_up_to_a_limit() {
    let long = format!("{}/0.json", "x".repeat(300));
    check(&[(&long, talk("What?", "Long."))], &["/0 [] Long."]);
    let mut archive = tar::Builder::new(Vec::new());
    let mut append = |name: &str, kind: u8, bytes: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(EntryType::new(kind));
        header.set_size(bytes.len() as u64);
        header.set_path(name).unwrap();
        header.set_cksum();
        archive.append(&header, bytes).unwrap();
    };
    append("././@LongLink", b'L', &vec![b'y'; MAX_NAME as usize + 1]);
    append("0.json", b'0', &talk("What?", "Lost."));
    append("PaxHeader", b'x', b"19 path=pax/1.json\n30 mtime=1700000000.123456789\n");
    append("cut.json", b'0', &talk("What?", "By its header."));
    append("PaxHeader", b'x', &vec![b' '; MAX_EXTENDED_HEADER as usize + 1]);
    append("2.json", b'0', &talk("What?", "Lost."));
    append("3.png", b'2', b"");
    append("3.json", b'0', &talk("What?", "Blind."));
    let (_folder, sources) = open_archive(&archive.into_inner().unwrap());
    for source in sources {
        for (index, expected) in [
            "record `0`: the name of its member has 4097 bytes, more than 4096",
            "pax/1 [] By its header.",
            "record `2`: the header before its member has 1048577 bytes",
            "record `3`: its .png is a link",
        ]
        .iter()
        .enumerate()
        {
            let seen = seen(&*source, index as u64);
            assert!(seen.contains(expected), "`{seen}` lacks `{expected}`");
        }
    }
}

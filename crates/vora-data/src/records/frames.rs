//! Which pictures a record of JSON names, and what looks like one and is not taken.

use std::borrow::Cow;

use anyhow::{Result, bail, ensure};
use serde_json::{Map, Value};

use super::keys::RecordKeys;

/// The keys under which pictures are looked for.
pub(crate) fn picture_keys(keys: &RecordKeys) -> Vec<&str> {
    let mut names = vec![keys.frames.as_str(), "images", "image"];
    names.dedup();
    names
}

/// Whether a value says anything.
pub(crate) fn is_given(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Array(list) => list.iter().any(is_given),
        Value::Object(object) => object.values().any(is_given),
        _ => true,
    }
}

/// The pictures under a record's keys: a name, an object, or a list of either.
pub(crate) fn frames(object: &mut Map<String, Value>, keys: &RecordKeys) -> Result<Vec<String>> {
    let mut found: Option<(&str, Vec<String>)> = None;
    for key in picture_keys(keys) {
        let Some(value) = object.remove(key).filter(is_given) else { continue };
        let list = match value {
            Value::Array(list) => list,
            one => vec![one],
        };
        if let Some((other, _)) = found {
            bail!("it has both `{other}` and `{key}`");
        }
        let mut names = Vec::with_capacity(list.len());
        for value in &list {
            names.extend(frame(value).map_err(|error| error.context(format!("its `{key}`")))?);
        }
        found = Some((key, names));
    }
    Ok(found.map_or(Vec::new(), |(_, names)| names))
}

/// A picture's name, or its bytes as a `data:` address; none where the value is null.
pub(crate) fn frame(value: &Value) -> Result<Option<String>> {
    match value {
        Value::Null => Ok(None),
        Value::String(bytes) if is_base64_picture(bytes) => Ok(Some(format!("data:;base64,{bytes}"))),
        Value::String(name) => {
            ensure!(
                name.starts_with("data:") || !name.contains("://"),
                "`{name:.80}` is an address, and training fetches nothing: put the picture into the image folder and name \
                 its file"
            );
            Ok(Some(name.clone()))
        }
        Value::Object(picture) => {
            let given = |key| picture.get(key).filter(|value| is_given(value));
            match (given("bytes"), given("path").or_else(|| given("url"))) {
                (Some(Value::String(bytes)), _) if bytes.starts_with("data:") => Ok(Some(bytes.clone())),
                (Some(Value::String(bytes)), _) => Ok(Some(format!("data:;base64,{bytes}"))),
                (Some(_), _) => bail!("a picture's `bytes` are no string of base64"),
                (None, Some(name)) => frame(name),
                (None, None) => bail!("a picture has neither `path` nor `bytes`"),
            }
        }
        _ => bail!("a picture is a name, or an object with `path` or `bytes`"),
    }
}

/// A picture's name for people: of one that stands in the record itself only the beginning.
pub fn short_name(frame: &str) -> Cow<'_, str> {
    const SHOWN: usize = 80;
    match frame.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}… ({} characters)", &frame[..end], frame.chars().count()).into(),
        None => frame.into(),
    }
}

/// Notes of keys that look like pictures and are not read.
///
/// # Errors
/// Where one names a picture and the record has none: it would be learned blind.
pub(crate) fn not_taken(object: &Map<String, Value>, keys: &RecordKeys, is_blind: bool) -> Result<Vec<String>> {
    let mut notes = Vec::new();
    for (key, value) in object {
        if !is_picture_key(key) || !is_given(value) {
            continue;
        }
        let names_picture = names_picture(value);
        ensure!(
            !(is_blind && names_picture),
            "its `{key}` names a picture, but pictures are read from {}; `frames_key: {key}` reads it",
            picture_keys(keys).iter().map(|key| format!("`{key}`")).collect::<Vec<_>>().join(", ")
        );
        if names_picture || is_blind && !matches!(value, Value::Number(_) | Value::Bool(_)) {
            notes.push(format!("its `{key}` is not read"));
        }
    }
    Ok(notes)
}

/// Whether a key or a column is called like one of pictures.
pub(crate) fn is_picture_key(key: &str) -> bool {
    let key = key.to_lowercase();
    ["image", "img", "picture", "photo", "frame"].iter().any(|word| key.contains(word)) || is_ending(&key)
}

fn is_ending(ending: &str) -> bool {
    let endings = [
        "jpg", "jpeg", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "pbm", "pnm", "avif", "heic",
        "jxl",
    ];
    endings.contains(&ending.to_lowercase().as_str())
}

fn names_picture(value: &Value) -> bool {
    match value {
        Value::String(text) => {
            let ending = text.split('?').next().and_then(|name| name.rsplit_once('.')).map(|(_, ending)| ending);
            text.starts_with("data:image") || ending.is_some_and(is_ending) || is_base64_picture(text)
        }
        Value::Array(list) => list.iter().any(names_picture),
        Value::Object(object) => {
            let given = |key| object.get(key).is_some_and(is_given);
            given("bytes") || ["path", "url"].iter().any(|key| object.get(*key).is_some_and(names_picture))
        }
        _ => false,
    }
}

/// Whether a text is the base64 of a PNG, JPEG, GIF or RIFF.
fn is_base64_picture(text: &str) -> bool {
    let starts = ["iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR"];
    let is_base64 = |byte: u8| byte.is_ascii_alphanumeric() || b"+/=\r\n".contains(&byte);
    text.len() > 64 && starts.iter().any(|start| text.starts_with(start)) && text.bytes().all(is_base64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::records::Record;

    const WORDS: &str = r#""conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat."}]"#;

    fn parse(keys: &str) -> Result<Record> {
        Record::parse(format!("{{{keys}, {WORDS}}}").as_bytes(), &RecordKeys::default())
    }

    #[test]
    fn pictures_are_named_in_several_ways() {
        for (keys, names) in [
            (r#""images": "a.png""#, vec!["a.png"]),
            (r#""images": ["a.png", "b.png"]"#, vec!["a.png", "b.png"]),
            (r#""images": [{"path": "a.png", "bytes": null}, null]"#, vec!["a.png"]),
            (r#""image": {"bytes": "iVBORw0K", "path": "a.png"}"#, vec!["data:;base64,iVBORw0K"]),
            (r#""frames": null, "image": "a.png", "images": []"#, vec!["a.png"]),
        ] {
            let record = parse(keys).unwrap();
            assert_eq!(record.frames, names, "{keys}");
            assert!(record.notes[0].contains("no mark `<image>`") && record.notes.len() == 1, "{:?}", record.notes);
        }
        let parts = r#"{"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}, {"text": "What?"},
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0K"}}]},
            {"role": "assistant", "content": "A cat."}]}"#;
        let record = Record::parse(parts.as_bytes(), &RecordKeys::default()).unwrap();
        assert_eq!(record.frames, ["a.png", "data:image/png;base64,iVBORw0K"]);
        assert!(record.notes.is_empty());
    }

    #[test]
    fn a_picture_may_stand_in_the_record_as_base64() {
        let base64 = format!("/9j/{}==", "Ab+/".repeat(40));
        for key in ["image", "images", "frames"] {
            assert_eq!(parse(&format!(r#""{key}": "{base64}""#)).unwrap().frames, [format!("data:;base64,{base64}")]);
        }
        let path = format!("/9j/{}.jpg", "folder/".repeat(12));
        assert_eq!(parse(&format!(r#""image": "{path}""#)).unwrap().frames, [path]);
    }

    #[test]
    fn a_long_name_is_shown_by_its_beginning() {
        assert_eq!(short_name("a/b.png"), "a/b.png");
        let name = format!("data:;base64,{}", "é".repeat(1000));
        assert_eq!(short_name(&name), format!("data:;base64,{}… (1013 characters)", "é".repeat(67)));
    }

    #[test]
    fn what_is_not_read_is_refused_or_told_by_name() {
        let error = |keys: &str| format!("{:#}", parse(keys).unwrap_err());
        for (keys, says) in [
            (r#""images": ["https://a.org/b.png"]"#, "its `images`: `https://a.org/b.png` is an address"),
            (r#""images": [3]"#, "its `images`: a picture is a name"),
            (r#""images": ["a.png"], "image": "a.png""#, "both `images` and `image`"),
            (r#""videos": ["a.mp4"]"#, "its `videos` has a video"),
            (
                r#""img_path": "a/b.JPG""#,
                "its `img_path` names a picture, but pictures are read from `frames`, `images`, `image`",
            ),
            (r#""picture": [{"bytes": "xx"}]"#, "its `picture` names a picture"),
            (r#""jpg": "a.jpg""#, "its `jpg` names a picture"),
            (r#""img": "a.ppm""#, "its `img` names a picture"),
            (r#""image_url": "http://a.org/b.png?c=d""#, "its `image_url` names a picture"),
        ] {
            assert!(error(keys).contains(says), "{}", error(keys));
        }
        let notes = |keys: &str| parse(keys).unwrap().notes;
        assert_eq!(notes(r#""image_source": "coco""#), ["its `image_source` is not read"]);
        assert_eq!(notes(r#""image": "a.png", "thumb_img": "b.png""#)[1], "its `thumb_img` is not read");
        assert!(notes(r#""image_id": 7, "images": [], "img": null, "source": "a.png""#).is_empty());
    }

    #[test]
    fn an_id_is_of_any_type() {
        for (id, shown) in [("7", "7"), ("1.5", "1.5"), ("true", "true"), (r#"["a", 1]"#, r#"["a",1]"#), ("null", "")] {
            assert_eq!(parse(&format!(r#""id": {id}"#)).unwrap().id, shown);
        }
    }
}

//! TensorBoard's event files: records framed as TFRecord has them, protocol buffers of TensorFlow's `event.proto` and
//! `summary.proto`, as far as a run fills them.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use image::RgbImage;
use prost::Message;

/// What every event file's name begins with.
const PREFIX: &str = "events.out.tfevents.";

/// The open event file of a run.
#[derive(Debug)]
pub struct EventWriter {
    path: PathBuf,
    file: File,
    clock: fn() -> f64,
}

impl EventWriter {
    /// Begins a file in a run's folder that goes on after `step`.
    ///
    /// At 0 the event files that lie there are of a run that is written over, and removed. A later one makes readers
    /// drop what earlier files have of the steps from `step` on: the caller writes that step's values again.
    ///
    /// # Errors
    /// Where an old file cannot be removed or the new one not be written.
    pub fn open(run: &Path, step: u64) -> Result<Self> {
        if step == 0 {
            for path in files(run)? {
                fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
            }
        }
        // Readers take the files of a run in the order of their names.
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let name = format!("{PREFIX}{:010}.{:09}.vora", since_1970.as_secs(), since_1970.subsec_nanos());
        let clock = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        Self::create(run.join(name), step, clock)
    }

    fn create(path: PathBuf, step: u64, clock: fn() -> f64) -> Result<Self> {
        let file = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
        let mut this = Self { path, file, clock };
        this.write(0, What::FileVersion("brain.Event:2".to_owned()))?;
        if step > 0 {
            this.write(step, What::SessionLog(SessionLog { status: SessionLog::START }))?;
        }
        Ok(this)
    }

    /// Numbers of a step, each by its tag.
    ///
    /// # Errors
    /// Where the file cannot be written.
    pub fn scalars(&mut self, step: u64, values: &[(String, f64)]) -> Result<()> {
        let value = |(tag, number): &(String, f64)| Value {
            tag: tag.clone(),
            metadata: None,
            value: Some(Shown::SimpleValue(*number as f32)),
        };
        self.summary(step, values.iter().map(value).collect())
    }

    /// A picture.
    ///
    /// # Errors
    /// Where the picture cannot be encoded or the file not be written.
    pub fn image(&mut self, step: u64, tag: &str, image: &RgbImage) -> Result<()> {
        let mut png = std::io::Cursor::new(Vec::new());
        image.write_to(&mut png, image::ImageFormat::Png).with_context(|| format!("encoding {tag}"))?;
        let shown = Image {
            height: i32::try_from(image.height())?,
            width: i32::try_from(image.width())?,
            colorspace: Image::RGB,
            encoded_image_string: png.into_inner(),
        };
        self.summary(step, vec![Value { tag: tag.to_owned(), metadata: None, value: Some(Shown::Image(shown)) }])
    }

    /// A text in Markdown.
    ///
    /// # Errors
    /// Where the file cannot be written.
    pub fn text(&mut self, step: u64, tag: &str, text: &str) -> Result<()> {
        let metadata = Metadata { plugin_data: Some(PluginData { plugin_name: "text".to_owned() }) };
        let tensor = TensorProto {
            dtype: TensorProto::STRING,
            tensor_shape: Some(TensorShape { dim: vec![Dim { size: 1 }] }),
            string_val: vec![text.as_bytes().to_vec()],
        };
        let value = Value { tag: tag.to_owned(), metadata: Some(metadata), value: Some(Shown::Tensor(tensor)) };
        self.summary(step, vec![value])
    }

    fn summary(&mut self, step: u64, value: Vec<Value>) -> Result<()> {
        self.write(step, What::Summary(Summary { value }))
    }

    /// One event, which is in the file when this returns.
    fn write(&mut self, step: u64, what: What) -> Result<()> {
        let event = Event { wall_time: (self.clock)(), step: i64::try_from(step)?, what: Some(what) };
        let framed = record(&event.encode_to_vec());
        self.file.write_all(&framed).with_context(|| format!("cannot write {}", self.path.display()))
    }
}

/// The event files in a folder, in the order in which readers take them.
///
/// # Errors
/// Where the folder cannot be listed.
pub fn files(run: &Path) -> Result<Vec<PathBuf>> {
    let what = || format!("cannot list {}", run.display());
    let mut found = Vec::new();
    for entry in fs::read_dir(run).with_context(what)? {
        let path = entry.with_context(what)?.path();
        if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(PREFIX)) {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// A TFRecord: length, its checksum, the bytes, their checksum, all little-endian.
fn record(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    [&length[..], &masked_crc32c(&length).to_le_bytes(), data, &masked_crc32c(data).to_le_bytes()].concat()
}

/// TFRecord's checksum: CRC-32C, turned right by 15 bits, plus a constant.
fn masked_crc32c(data: &[u8]) -> u32 {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// The scalars of a run's event files as TensorBoard shows them, `(tag, step, value)`.
///
/// # Errors
/// Names the file that is not whole.
pub fn scalars(run: &Path) -> Result<Vec<(String, u64, f32)>> {
    let mut found: Vec<(String, u64, f32)> = Vec::new();
    for event in events(run)? {
        let step = event.step as u64;
        match event.what {
            Some(What::SessionLog(_)) => found.retain(|(_, earlier, _)| *earlier < step),
            Some(What::Summary(summary)) => {
                for value in summary.value {
                    if let Some(Shown::SimpleValue(number)) = value.value {
                        found.push((value.tag, step, number));
                    }
                }
            }
            _ => {}
        }
    }
    Ok(found)
}

/// The tags of pictures and texts in a run's event files, with their steps.
///
/// # Errors
/// Names the file that is not whole.
pub fn shown(run: &Path) -> Result<Vec<(String, u64)>> {
    let values = |event: Event| match event.what {
        Some(What::Summary(summary)) => summary.value.into_iter().map(|v| (v, event.step as u64)).collect(),
        _ => Vec::new(),
    };
    let other = |(value, step): (Value, u64)| {
        (!matches!(value.value, Some(Shown::SimpleValue(_)))).then_some((value.tag, step))
    };
    Ok(events(run)?.into_iter().flat_map(values).filter_map(other).collect())
}

fn events(run: &Path) -> Result<Vec<Event>> {
    let mut all = Vec::new();
    for path in files(run)? {
        let bytes = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let events = decode(&bytes).with_context(|| format!("{} is not a whole event file", path.display()))?;
        all.extend(events);
    }
    Ok(all)
}

/// Events as they are framed; none where a length or a checksum is wrong.
fn decode(mut bytes: &[u8]) -> Option<Vec<Event>> {
    let mut events = Vec::new();
    while !bytes.is_empty() {
        let length = usize::try_from(u64::from_le_bytes(*bytes.first_chunk()?)).ok()?;
        let (framed, rest) = bytes.split_at_checked(length.checked_add(16)?)?;
        let payload = &framed[12..12 + length];
        if record(payload) != framed {
            return None;
        }
        events.push(Event::decode(payload).ok()?);
        bytes = rest;
    }
    Some(events)
}

/// `tensorflow.Event`
#[derive(Clone, PartialEq, Message)]
struct Event {
    #[prost(double, tag = "1")]
    wall_time: f64, // seconds since 1970
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(oneof = "What", tags = "3, 5, 7")]
    what: Option<What>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum What {
    #[prost(string, tag = "3")]
    FileVersion(String),
    #[prost(message, tag = "5")]
    Summary(Summary),
    #[prost(message, tag = "7")]
    SessionLog(SessionLog),
}

/// `tensorflow.SessionLog`
#[derive(Clone, PartialEq, Message)]
struct SessionLog {
    #[prost(int32, tag = "1")]
    status: i32,
}

impl SessionLog {
    const START: i32 = 1;
}

/// `tensorflow.Summary`
#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    value: Vec<Value>,
}

/// `tensorflow.Summary.Value`
#[derive(Clone, PartialEq, Message)]
struct Value {
    #[prost(string, tag = "1")]
    tag: String,
    #[prost(message, optional, tag = "9")]
    metadata: Option<Metadata>,
    #[prost(oneof = "Shown", tags = "2, 4, 8")]
    value: Option<Shown>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum Shown {
    #[prost(float, tag = "2")]
    SimpleValue(f32),
    #[prost(message, tag = "4")]
    Image(Image),
    #[prost(message, tag = "8")]
    Tensor(TensorProto),
}

/// `tensorflow.Summary.Image`
#[derive(Clone, PartialEq, Message)]
struct Image {
    #[prost(int32, tag = "1")]
    height: i32,
    #[prost(int32, tag = "2")]
    width: i32,
    #[prost(int32, tag = "3")]
    colorspace: i32,
    #[prost(bytes = "vec", tag = "4")]
    encoded_image_string: Vec<u8>,
}

impl Image {
    const RGB: i32 = 3;
}

/// `tensorflow.SummaryMetadata`
#[derive(Clone, PartialEq, Message)]
struct Metadata {
    #[prost(message, optional, tag = "1")]
    plugin_data: Option<PluginData>,
}

/// `tensorflow.SummaryMetadata.PluginData`
#[derive(Clone, PartialEq, Message)]
struct PluginData {
    #[prost(string, tag = "1")]
    plugin_name: String,
}

/// `tensorflow.TensorProto`
#[derive(Clone, PartialEq, Message)]
struct TensorProto {
    #[prost(int32, tag = "1")]
    dtype: i32,
    #[prost(message, optional, tag = "2")]
    tensor_shape: Option<TensorShape>,
    #[prost(bytes = "vec", repeated, tag = "8")]
    string_val: Vec<Vec<u8>>,
}

impl TensorProto {
    const STRING: i32 = 7;
}

/// `tensorflow.TensorShapeProto`
#[derive(Clone, PartialEq, Message)]
struct TensorShape {
    #[prost(message, repeated, tag = "2")]
    dim: Vec<Dim>,
}

/// `tensorflow.TensorShapeProto.Dim`
#[derive(Clone, PartialEq, Message)]
struct Dim {
    #[prost(int64, tag = "1")]
    size: i64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_the_bytes_of_the_reference() {
        let golden = fs::read(fixtures::root().join("golden/tensorboard_events.tfevents")).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("events");
        let mut writer = EventWriter::create(path.clone(), 7, || 1_700_000_000.5).unwrap();
        let named = |tag: &str, value| (tag.to_owned(), value);
        writer.scalars(7, &[named("train/loss", 1.5), named("train/grad_norm", 0.0)]).unwrap();
        writer.text(8, "samples/test-0", "**question:** Wo?\n\n**answer:** größer").unwrap();
        let (head, rest) = golden.split_at(fs::metadata(&path).unwrap().len() as usize);
        assert_eq!(fs::read(&path).unwrap(), head);

        // The reference's picture is of its own encoder: the event around it is the same.
        let [theirs] = &decode(rest).unwrap()[..] else { panic!("the golden file ends in one picture") };
        let Some(What::Summary(Summary { value })) = &theirs.what else { panic!("{theirs:?}") };
        let Some(Shown::Image(image)) = &value[0].value else { panic!("{theirs:?}") };
        let picture = image::load_from_memory(&image.encoded_image_string).unwrap().to_rgb8();
        writer.image(9, &value[0].tag, &picture).unwrap();
        let mut ours = decode(&fs::read(&path).unwrap()[head.len()..]).unwrap();
        let Some(What::Summary(Summary { value })) = &mut ours[0].what else { panic!("{ours:?}") };
        let Some(Shown::Image(ours_image)) = &mut value[0].value else { panic!("a picture") };
        let again = image::load_from_memory(&ours_image.encoded_image_string).unwrap().to_rgb8();
        assert_eq!(again, picture);
        ours_image.encoded_image_string.clone_from(&image.encoded_image_string);
        assert_eq!(&ours[0], theirs);
    }

    #[test]
    fn a_new_file_takes_back_later_steps_and_a_new_run_all() {
        let folder = tempfile::tempdir().unwrap();
        let loss = |step: u64| [("train/loss".to_owned(), step as f64)];
        let mut first = EventWriter::open(folder.path(), 0).unwrap();
        for step in 1..=5 {
            first.scalars(step, &loss(step)).unwrap();
        }
        let mut second = EventWriter::open(folder.path(), 3).unwrap();
        for step in 3..=4 {
            second.scalars(step, &loss(10 * step)).unwrap();
        }
        let found: Vec<_> = scalars(folder.path()).unwrap().into_iter().map(|(_, step, value)| (step, value)).collect();
        assert_eq!(found, [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0)]);
        EventWriter::open(folder.path(), 0).unwrap();
        assert_eq!((files(folder.path()).unwrap().len(), scalars(folder.path()).unwrap().len()), (1, 0));
    }
}

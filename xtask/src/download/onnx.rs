//! Reader of what an ONNX file says about weights: initialisers, and which node takes which input.
//!
//! ONNX is protobuf; the six messages and dozen fields needed here are read straight from the wire format.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail, ensure};

/// Initialisers and nodes of a model's graph, borrowing the bytes they were read from.
#[derive(Debug, Default)]
pub(crate) struct Onnx<'a> {
    pub(crate) nodes: Vec<Node<'a>>,
    initializers: BTreeMap<&'a str, TensorProto<'a>>,
}

#[derive(Debug, Default)]
pub(crate) struct Node<'a> {
    pub(crate) op_type: &'a str,
    pub(crate) inputs: Vec<&'a str>,
    pub(crate) outputs: Vec<&'a str>,
}

#[derive(Debug, Default)]
struct TensorProto<'a> {
    name: &'a str,
    dims: Vec<usize>,
    data_type: u64,
    raw_data: &'a [u8],
    float_data: &'a [u8], // packed
    external: bool,
}

const FLOAT: u64 = 1; // TensorProto.DataType

impl<'a> Onnx<'a> {
    /// Reads the graph; the tensors' values are checked when asked for.
    pub(crate) fn parse(bytes: &'a [u8]) -> Result<Self> {
        let mut onnx = None;
        for field in Fields(bytes) {
            if let (7, Wire::Bytes(graph)) = field.context("this is not an ONNX file")? {
                onnx = Some(Self::parse_graph(graph).context("reading the ONNX graph")?);
            }
        }
        onnx.context("this ONNX file has no graph")
    }

    fn parse_graph(bytes: &'a [u8]) -> Result<Self> {
        let mut graph = Self::default();
        for field in Fields(bytes) {
            match field? {
                (1, Wire::Bytes(node)) => graph.nodes.push(Node::parse(node)?),
                (5, Wire::Bytes(tensor)) => {
                    let tensor = TensorProto::parse(tensor)?;
                    let name = tensor.name;
                    let earlier = graph.initializers.insert(name, tensor);
                    ensure!(earlier.is_none(), "initialiser `{name}` stands there twice");
                }
                _ => {}
            }
        }
        Ok(graph)
    }

    /// Names of all initialisers, sorted.
    pub(crate) fn names(&self) -> impl Iterator<Item = &'a str> {
        self.initializers.keys().copied()
    }

    pub(crate) fn shape(&self, name: &str) -> Option<&[usize]> {
        self.initializers.get(name).map(|tensor| tensor.dims.as_slice())
    }

    /// Shape and values of an f32 initialiser.
    pub(crate) fn tensor(&self, name: &str) -> Result<(Vec<usize>, Vec<f32>)> {
        let tensor = self.initializers.get(name).with_context(|| format!("there is no initialiser `{name}`"))?;
        let values = tensor.values().with_context(|| format!("initialiser `{name}`"))?;
        Ok((tensor.dims.clone(), values))
    }
}

impl<'a> Node<'a> {
    fn parse(bytes: &'a [u8]) -> Result<Self> {
        let mut node = Self::default();
        for field in Fields(bytes) {
            match field? {
                (1, Wire::Bytes(name)) => node.inputs.push(text(name)?),
                (2, Wire::Bytes(name)) => node.outputs.push(text(name)?),
                (4, Wire::Bytes(name)) => node.op_type = text(name)?,
                _ => {}
            }
        }
        Ok(node)
    }
}

impl<'a> TensorProto<'a> {
    fn parse(bytes: &'a [u8]) -> Result<Self> {
        let mut tensor = Self::default();
        for field in Fields(bytes) {
            match field? {
                (1, Wire::Varint(dim)) => tensor.dims.push(usize::try_from(dim)?),
                (1, Wire::Bytes(mut packed)) => {
                    while !packed.is_empty() {
                        tensor.dims.push(usize::try_from(varint(&mut packed)?)?);
                    }
                }
                (2, Wire::Varint(data_type)) => tensor.data_type = data_type,
                (4, Wire::Bytes(packed)) => tensor.float_data = packed,
                (8, Wire::Bytes(name)) => tensor.name = text(name)?,
                (9, Wire::Bytes(raw)) => tensor.raw_data = raw,
                (14, Wire::Varint(location)) => tensor.external = location == 1,
                _ => {}
            }
        }
        Ok(tensor)
    }

    fn values(&self) -> Result<Vec<f32>> {
        ensure!(!self.external, "its values lie in another file, which is not read here");
        ensure!(self.data_type == FLOAT, "it has data type {}, only f32 ({FLOAT}) is read here", self.data_type);
        let bytes = if self.raw_data.is_empty() { self.float_data } else { self.raw_data };
        let count = self.dims.iter().try_fold(1usize, |count, &dim| count.checked_mul(dim));
        ensure!(
            count.and_then(|count| count.checked_mul(4)) == Some(bytes.len()),
            "its shape {:?} does not fit its {} bytes of f32",
            self.dims,
            bytes.len()
        );
        let (values, _) = bytes.as_chunks();
        Ok(values.iter().map(|&value| f32::from_le_bytes(value)).collect())
    }
}

/// The fields of one protobuf message: number and value.
struct Fields<'a>(&'a [u8]);

#[derive(Debug, Clone, Copy)]
enum Wire<'a> {
    Varint(u64),
    Bytes(&'a [u8]),
    Fixed, // no field of this kind is of interest
}

impl<'a> Iterator for Fields<'a> {
    type Item = Result<(u64, Wire<'a>)>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_err() {
            self.0 = &[]; // nothing after a broken field can be read
        }
        Some(field)
    }
}

impl<'a> Fields<'a> {
    fn field(&mut self) -> Result<(u64, Wire<'a>)> {
        let tag = varint(&mut self.0)?;
        let wire = match tag & 7 {
            0 => Wire::Varint(varint(&mut self.0)?),
            1 => self.take(8).map(|_| Wire::Fixed)?,
            2 => {
                let len = varint(&mut self.0)?;
                Wire::Bytes(self.take(len)?)
            }
            5 => self.take(4).map(|_| Wire::Fixed)?,
            kind => bail!("protobuf field {} has unknown wire type {kind}", tag >> 3),
        };
        Ok((tag >> 3, wire))
    }

    fn take(&mut self, len: u64) -> Result<&'a [u8]> {
        let split = usize::try_from(len).ok().and_then(|len| self.0.split_at_checked(len));
        let (taken, rest) = split
            .with_context(|| format!("a field of {len} bytes, {} are left: is the file cut off?", self.0.len()))?;
        self.0 = rest;
        Ok(taken)
    }
}

fn varint(bytes: &mut &[u8]) -> Result<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (&byte, rest) = bytes.split_first().context("the file ends inside a number: is it cut off?")?;
        *bytes = rest;
        value |= u64::from(byte & 127) << shift;
        if byte < 128 {
            return Ok(value);
        }
    }
    bail!("a number has more than 64 bits")
}

fn text(bytes: &[u8]) -> Result<&str> {
    std::str::from_utf8(bytes).context("a name is not UTF-8")
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &[u8] = include_bytes!("../../../fixtures/golden/onnx_file.onnx");

    #[test]
    fn initialisers_and_nodes_are_read() {
        let onnx = Onnx::parse(FILE).unwrap();
        let (shape, values) = onnx.tensor("onnx::MatMul_1").unwrap();
        assert_eq!((shape, values), (vec![2, 3], vec![0., 1., 2., 3., 4., 5.]));
        let float_data = "backbone.encoder.layer.0.attention.attention.query.bias";
        assert_eq!(onnx.tensor(float_data).unwrap().1, [0., 1., 2.]);
        assert_eq!(onnx.names().count(), 5);
        let kinds: Vec<_> = onnx.nodes.iter().map(|node| node.op_type).collect();
        assert_eq!(kinds, ["MatMul", "Add", "MatMul", "Add", "MatMul"]);
        assert_eq!(
            (&onnx.nodes[0].inputs[..], &onnx.nodes[0].outputs[..]),
            (&["x", "onnx::MatMul_1"][..], &["/key/MatMul"][..])
        );
    }

    #[test]
    fn what_is_no_f32_tensor_is_refused() {
        let onnx = Onnx::parse(FILE).unwrap();
        let error = |name| format!("{:#}", onnx.tensor(name).unwrap_err());
        assert!(error("shape").contains("data type 7, only f32"), "{}", error("shape"));
        assert!(error("nope").contains("no initialiser `nope`"));
        let external = [8, 2, 0x10, 1, 0x70, 1]; // dims 2, f32, data_location 1
        let error = TensorProto::parse(&external).unwrap().values().unwrap_err().to_string();
        assert!(error.contains("another file"), "{error}");
        let short = [8, 2, 0x10, 1, 0x4a, 4, 0, 0, 0, 0]; // dims 2, f32, raw_data of 4 bytes
        let error = TensorProto::parse(&short).unwrap().values().unwrap_err().to_string();
        assert!(error.contains("[2] does not fit its 4 bytes"), "{error}");
    }

    #[test]
    fn cut_or_altered_files_do_not_panic() {
        let whole = Onnx::parse(FILE).unwrap().names().count();
        for len in 0..FILE.len() {
            // Cut between two fields of the model it may still be whole; never is a part of the graph passed off as all.
            if let Ok(onnx) = Onnx::parse(&FILE[..len]) {
                assert_eq!(onnx.names().count(), whole, "cut at {len}");
            }
        }
        let mut bytes = FILE.to_vec();
        for at in 0..FILE.len() {
            for value in [0, 1, 0x7f, 0x80, 0xff] {
                bytes[at] = value;
                if let Ok(onnx) = Onnx::parse(&bytes) {
                    onnx.names().for_each(|name| drop(onnx.tensor(name)));
                }
            }
            bytes[at] = FILE[at];
        }
        let error = format!("{:#}", Onnx::parse(b"\x3a\xff\xff\xff\xff\x0f").unwrap_err());
        assert!(error.contains("is the file cut off?"), "{error}");
    }
}

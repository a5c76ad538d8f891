//! The input of a vision transformer's first block: tokens that are no patch, then patches with their positions.

use std::cell::RefCell;

use tch::{Kind, Tensor, nn::Module};

use crate::transformer::norm::Norm;
use crate::transformer::patchify::patchify;
use crate::transformer::positions::Positions;

/// `[class + position | registers | norm(patchify(pixels)) + positions]`
#[derive(Debug)]
pub(crate) struct Embeddings {
    weight: Tensor, // [hidden, 3, patch, patch], or as `layout` says
    layout: Layout,
    bias: Option<Tensor>,      // [hidden]
    norm: Option<Norm>,        // of the patches alone
    class: Option<Tensor>,     // [.., hidden], one token
    registers: Option<Tensor>, // [1, registers, hidden]
    positions: Positions,
    kind: Kind,                                // of what comes out
    last: RefCell<Option<(i64, i64, Tensor)>>, // the positions of the last grid, where they do not learn
}

/// How the weight of the convolution lies in its file.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Layout {
    /// `[hidden, 3, patch, patch]`
    Convolution,
    /// `[hidden, patch * patch * 3]`: a layer over a patch's pixels, channel after channel.
    ChannelsLast {
        /// Side of a patch, in pixels.
        patch: i64,
    },
}

impl Embeddings {
    /// `weight` is `[hidden, 3, patch, patch]`, `bias` `[hidden]`; what comes out is in `kind`.
    pub(crate) fn new(weight: Tensor, bias: Option<Tensor>, positions: Positions, kind: Kind) -> Self {
        let layout = Layout::Convolution;
        let last = RefCell::new(None);
        Self { weight, layout, bias, norm: None, class: None, registers: None, positions, kind, last }
    }

    /// The same with a weight that lies otherwise.
    pub(crate) fn with_layout(self, layout: Layout) -> Self {
        Self { layout, ..self }
    }

    /// The same with a norm between the convolution and the positions.
    pub(crate) fn with_norm(self, norm: Norm) -> Self {
        Self { norm: Some(norm), ..self }
    }

    /// The same with a class token `[.., hidden]` before the patches, which has the first of the positions, and registers
    /// `[1, registers, hidden]`, which have none.
    pub(crate) fn with_class(self, class: Tensor, registers: Option<Tensor>) -> Self {
        Self { class: Some(class), registers, ..self }
    }

    /// `[hidden, 3, patch, patch]`
    pub(crate) fn weight(&self) -> Tensor {
        match self.layout {
            Layout::Convolution => self.weight.shallow_clone(),
            Layout::ChannelsLast { patch } => self.weight.view([-1, patch, patch, 3]).permute([0, 3, 1, 2]),
        }
    }

    /// Channels.
    pub(crate) fn hidden_size(&self) -> i64 {
        self.weight.size()[0]
    }

    /// Side of a patch, in pixels.
    pub(crate) fn patch_size(&self) -> i64 {
        match self.layout {
            Layout::Convolution => self.weight.size()[3],
            Layout::ChannelsLast { patch } => patch,
        }
    }

    /// The dtype of what comes out.
    pub(crate) fn kind(&self) -> Kind {
        self.kind
    }

    /// `[hidden]`
    pub(crate) fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// Tokens before the patches.
    pub(crate) fn num_prefix_tokens(&self) -> i64 {
        i64::from(self.class.is_some()) + self.registers.as_ref().map_or(0, |registers| registers.size()[1])
    }

    /// `[1, prefix, hidden]`: what stands before the patches.
    fn prefix(&self) -> Option<Tensor> {
        let class = self.class.as_ref()?.view([1, 1, -1]);
        let class = match self.positions.before() {
            Some(position) => class + position,
            None => class,
        };
        Some(match &self.registers {
            Some(registers) => Tensor::cat(&[&class, registers], 1),
            None => class,
        })
    }

    /// `[rows * columns, hidden]`, kept until another grid is asked for
    pub(crate) fn positions(&self, rows: i64, columns: i64) -> Tensor {
        if self.positions.learn() {
            return self.positions.at(rows, columns);
        }
        if let Some((r, c, positions)) = &*self.last.borrow()
            && (*r, *c) == (rows, columns)
        {
            return positions.shallow_clone();
        }
        let positions = self.positions.at(rows, columns);
        *self.last.borrow_mut() = Some((rows, columns, positions.shallow_clone()));
        positions
    }
}

impl Module for Embeddings {
    /// `[batch, 3, height, width]` -> `[batch, prefix + patches, hidden]`
    fn forward(&self, pixel_values: &Tensor) -> Tensor {
        let (batch, _, height, width) = pixel_values.size4().expect("pixel_values is [batch, 3, height, width]");
        let (patch, kind) = (self.patch_size(), self.kind);
        let bias = self.bias.as_ref().map(|bias| bias.to_kind(kind));
        let mut patches = patchify(&pixel_values.to_kind(kind), &self.weight().to_kind(kind), bias.as_ref());
        if let Some(norm) = &self.norm {
            patches = norm.forward(&patches);
        }
        // [batch, patches, hidden]
        let patches = patches + self.positions(height / patch, width / patch).to_kind(kind);
        match self.prefix() {
            Some(prefix) => Tensor::cat(&[prefix.to_kind(kind).expand([batch, -1, -1], false), patches], 1),
            None => patches,
        }
    }
}

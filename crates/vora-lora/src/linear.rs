//! A linear layer that can carry named low-rank adapters.

use anyhow::{Context, Result, ensure};
use tch::{Kind, Tensor, nn::Module};
use vora_torch::dist::ShardedWeight;
use vora_torch::nn::decode::LoraId;
use vora_torch::weights::{Init, Quantization, QuantizedWeight, Weights};

use crate::acts_on::Active;
use crate::adapter::Adapter;
use crate::config::LoraConfig;
use crate::weight::Weight;

/// `y = x W^T + b + sum over adapters of scaling * (x A^T) B^T`; only the `A`s and `B`s are trained, unless the source of
/// the weights is [`Weights::trained`].
#[derive(Debug)]
pub struct Linear {
    weight: Weight,       // W [out, in], frozen, maybe in few bits or in shares, or a trained f32 master
    bias: Option<Tensor>, // b [out], likewise
    adapters: Vec<Adapter>,
    named: Vec<(LoraId, Adapter)>, // those that act where they are asked for by name
    adapters_bias: bool,           // whether the bias came with the adapters and acts where they do
}

impl Linear {
    /// Takes `weight` `[out_features, in_features]` and, where `bias`, `bias` `[out_features]`; both stay frozen, unless
    /// the source is [`Weights::trained`]. A source that is [`Weights::quantized`] keeps the frozen weight in few bits: each
    /// product makes it whole again; one that is [`Weights::sharded`] keeps a share of it.
    ///
    /// # Errors
    /// Where the source has nothing to make them of; tensors that do not fit are told by [`Weights::finish`].
    pub fn load(weights: &Weights, in_features: i64, out_features: i64, bias: bool) -> Result<Self> {
        let weight = Weight::load(weights, in_features, out_features)?;
        let bias = bias.then(|| weights.get("bias", &[out_features], Init::Zeros)).transpose()?;
        Ok(Self { weight, bias, adapters: Vec::new(), named: Vec::new(), adapters_bias: false })
    }

    /// Adds the adapter `name`: `lora_A.weight` and `lora_B.weight` of `weights`, as trained f32 parameters, and DoRA's
    /// `lora_magnitude_vector` where a checkpoint has one. The path of `weights` decides about the patterns of `config`.
    ///
    /// A source of new weights starts `A` Kaiming-uniform (a = sqrt 5) and `B` at zero, so that nothing changes yet.
    ///
    /// # Errors
    /// Where the name is taken or the configuration is out of range.
    pub fn attach(&mut self, name: &str, config: &LoraConfig, weights: &Weights) -> Result<()> {
        config.validate()?;
        let taken = self.adapters.iter().any(|adapter| adapter.name() == name);
        ensure!(!taken, "{} already carries an adapter `{name}`", weights.path());
        self.adapters.push(Adapter::load(name, config, weights, self.in_features(), self.out_features())?);
        Ok(())
    }

    /// Gives it this bias, `[out_features]`, as the published VoRA code gives one to each layer with adapters. Where
    /// there are some it acts on the tokens that they act on.
    ///
    /// # Panics
    /// Where it has one already, or the bias is of another shape.
    pub fn set_bias(&mut self, bias: Tensor) {
        assert!(self.bias.is_none() && bias.size() == [self.out_features()], "a bias {:?}", bias.size());
        self.bias = Some(bias);
        self.adapters_bias = !self.adapters.is_empty();
    }

    /// Takes the adapter `name` off again.
    ///
    /// # Errors
    /// Where there is none, with the names of those that there are.
    pub fn detach(&mut self, name: &str) -> Result<Adapter> {
        Ok(self.adapters.remove(self.position(name)?))
    }

    /// Takes an adapter in that acts where [`Active::Each`] has `id` alone. Merging leaves it as it is.
    pub fn add_named(&mut self, id: LoraId, adapter: Adapter) {
        self.named.push((id, adapter));
    }

    /// The adapters that act where they are asked for alone.
    pub fn named_adapters(&self) -> impl Iterator<Item = (LoraId, &Adapter)> {
        self.named.iter().map(|(id, adapter)| (*id, adapter))
    }

    /// The weight without adapters, `[out_features, in_features]`: the tensor itself, or a new one where it is kept in few
    /// bits. One that several processes share is brought together, which all of them do at once.
    pub fn weight(&self) -> Tensor {
        self.weight.whole()
    }

    /// The weight, where it is kept in few bits.
    pub fn quantized(&self) -> Option<&QuantizedWeight> {
        match &self.weight {
            Weight::Quantized(weight) => Some(weight),
            Weight::Plain(_) | Weight::Sharded(_) => None,
        }
    }

    /// The weight, where each of several processes has a share of it.
    pub fn sharded(&self) -> Option<&ShardedWeight> {
        match &self.weight {
            Weight::Sharded(weight) => Some(weight),
            Weight::Plain(_) | Weight::Quantized(_) => None,
        }
    }

    /// The weight, where it is a plain tensor: frozen, or a trained f32 master.
    pub fn plain(&self) -> Option<&Tensor> {
        match &self.weight {
            Weight::Plain(weight) => Some(weight),
            Weight::Quantized(_) | Weight::Sharded(_) => None,
        }
    }

    /// Brings the frozen weight into few bits; adapters and bias stay as they are. Nothing happens where it is in these already.
    ///
    /// # Errors
    /// Where it is in others, or trained; numbers that are not finite.
    pub fn quantize(&mut self, quantization: Quantization) -> Result<()> {
        self.weight.quantize(quantization)
    }

    /// The bias, `[out_features]`.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// Whether the bias acts on the tokens that adapters act on alone: see [`Linear::set_bias`].
    pub fn bias_is_adapted(&self) -> bool {
        self.adapters_bias
    }

    /// The last dimension of what goes in.
    pub fn in_features(&self) -> i64 {
        self.weight.size()[1]
    }

    /// The last dimension of what comes out.
    pub fn out_features(&self) -> i64 {
        self.weight.size()[0]
    }

    /// The model's own adapters, in the order they were attached; all of them are active.
    pub fn adapters(&self) -> impl Iterator<Item = &Adapter> {
        self.adapters.iter()
    }

    /// Number of trained elements over all adapters.
    pub fn num_adapter_parameters(&self) -> usize {
        self.adapters.iter().map(Adapter::num_parameters).sum()
    }

    /// What the adapter `name` adds to the weight, `[out, in]`, f32: `scaling * B A` where it has no magnitude.
    ///
    /// # Errors
    /// Where there is none, with the names of those that there are.
    pub fn delta_weight(&self, name: &str) -> Result<Tensor> {
        Ok(self.adapters[self.position(name)?].delta_weight(&self.weight.whole()))
    }

    /// Folds every adapter into the weight: summed in f32, rounded once to the weight's dtype. None is left, and a bias
    /// that was trained beside them has the weight's dtype. A weight in few bits is a plain one afterwards: what they stood
    /// for, with what was added.
    pub fn merge(&mut self) {
        let weight = self.weight.whole();
        if let Some(bias) = &self.bias
            && bias.requires_grad()
            && !weight.requires_grad()
        {
            self.bias = Some(bias.detach().to_kind(weight.kind()));
        }
        self.adapters_bias = false;
        let adapters = std::mem::take(&mut self.adapters);
        let deltas: Vec<Tensor> = adapters.iter().map(|adapter| adapter.delta_weight(&weight)).collect();
        self.add(deltas);
    }

    /// Folds the adapter `name` into the weight and hands it back for [`Linear::unmerge`].
    ///
    /// # Errors
    /// Where there is none, and where it has a magnitude: the weight that is left no longer tells the lengths that its rows had.
    pub fn merge_adapter(&mut self, name: &str) -> Result<Adapter> {
        let position = self.position(name)?;
        let is_dora = self.adapters[position].magnitude().is_some();
        ensure!(!is_dora, "adapter `{name}` is a DoRA, which merges for good only, together with all others");
        let adapter = self.adapters.remove(position);
        self.add([adapter.delta_weight(&self.weight.whole())]);
        Ok(adapter)
    }

    /// Takes a merged adapter out of the weight and attaches it again. The weight is what it was before the merge
    /// up to the rounding of its dtype: in bf16 a merge followed by this is not exact.
    pub fn unmerge(&mut self, adapter: Adapter) {
        self.add([-adapter.delta_weight(&self.weight.whole())]);
        self.adapters.push(adapter);
    }

    /// Adds f32 matrices `[out, in]` to the weight, rounding once.
    fn add(&mut self, deltas: impl IntoIterator<Item = Tensor>) {
        let deltas = deltas.into_iter().reduce(|mut sum, delta| sum.g_add_(&delta));
        let Some(mut sum) = deltas else { return };
        let mut weight = self.weight.whole();
        sum = sum.g_add_(&weight.detach().to_kind(Kind::Float));
        if weight.requires_grad() {
            tch::no_grad(|| weight.copy_(&sum)); // the leaf that an optimizer holds stays that leaf
        } else {
            // Into a new tensor: the weight may be a view of a checkpoint that others read too.
            self.weight = Weight::Plain(sum.to_kind(weight.kind()));
        }
    }

    /// `[.., in_features]` -> `[.., out_features]`, in the dtype of `x`; adapters act on the tokens of `active` alone, whose
    /// places count through the dimensions of `x` before its last. The others get what the layer would give them without
    /// adapters, bit for bit.
    pub fn forward_on(&self, x: &Tensor, active: &Active) -> Tensor {
        let bias = self.bias.as_ref().map(|bias| bias.to_kind(x.kind())); // frozen ones are in it already
        let own_bias = bias.as_ref().filter(|_| !self.adapters_bias);
        let is_plain = match active {
            Active::Off => true,
            Active::Each(_) => self.adapters.is_empty() && self.named.is_empty(),
            Active::All | Active::At(_) => self.adapters.is_empty(),
        };
        if is_plain {
            return self.weight.linear(x, own_bias);
        }
        let mut shape = x.size();
        // In two dimensions the adapter's product adds onto the base's output, with no second [tokens, out].
        let x = x.reshape([-1, self.in_features()]); // [tokens, in]
        let y = match active {
            Active::At(places) => {
                self.adapt_at(self.weight.linear(&x, own_bias), &x, LoraId::OWN, places, bias.as_ref())
            }
            Active::Each(each) => each.iter().fold(self.weight.linear(&x, own_bias), |y, (id, places)| {
                self.adapt_at(y, &x, *id, places, bias.as_ref())
            }),
            _ => self.adapt(self.weight.linear(&x, bias.as_ref()), &x, LoraId::OWN),
        };
        *shape.last_mut().expect("x is [.., in_features]") = self.out_features();
        y.reshape(shape)
    }

    /// What an adapter makes of the tokens at `places` of the base's output `y` `[tokens, out]`, which it writes into. The bias
    /// that came with the model's own acts where these do.
    fn adapt_at(&self, mut y: Tensor, x: &Tensor, id: LoraId, places: &Tensor, bias: Option<&Tensor>) -> Tensor {
        let mut at = y.index_select(0, places); // [n, out]
        if let Some(bias) = bias.filter(|_| self.adapters_bias && id == LoraId::OWN) {
            at += bias;
        }
        let at = self.adapt(at, &x.index_select(0, places), id);
        y.index_copy_(0, places, &at)
    }

    /// What the adapters of this id make of the base's output `y` `[tokens, out]`, which they write into, for `x` `[tokens, in]`.
    fn adapt(&self, mut y: Tensor, x: &Tensor, id: LoraId) -> Tensor {
        let own = self.adapters.iter().filter(|_| id == LoraId::OWN);
        for adapter in own.chain(self.named.iter().filter(|(of, _)| *of == id).map(|(_, adapter)| adapter)) {
            let xa = x.mm(&adapter.lora_a().to_kind(x.kind()).tr()); // [tokens, r]
            let b_t = adapter.scaled_b_t(x.kind()); // [r, out]
            y = match adapter.row_scale(|| self.weight.whole()) {
                None => y.addmm_(&xa, &b_t),
                Some(scale) => {
                    let base = self.weight.linear(x, None); // the bias is not scaled
                    y + base * (&scale - 1.0).to_kind(x.kind()) + xa.mm(&b_t) * scale.to_kind(x.kind())
                }
            };
        }
        y
    }

    fn position(&self, name: &str) -> Result<usize> {
        self.adapters.iter().position(|adapter| adapter.name() == name).with_context(|| {
            let names: Vec<&str> = self.adapters.iter().map(Adapter::name).collect();
            format!("no adapter `{name}` is attached; there are {names:?}")
        })
    }
}

impl Module for Linear {
    /// `[.., in_features]` -> `[.., out_features]`, in the dtype of `x`; adapters act on every token
    fn forward(&self, x: &Tensor) -> Tensor {
        self.forward_on(x, &Active::All)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fixtures::{Golden, assert_close_to};
    use tch::Device;
    use vora_torch::weights::Quantization;

    const F32: (Kind, Device) = (Kind::Float, Device::Cpu);

    fn config(r: i64, lora_alpha: Option<f64>) -> LoraConfig {
        LoraConfig { lora_alpha, ..LoraConfig::new(r, 1) }
    }

    /// A case of the reference with its adapters `(name, r, alpha)`.
    fn golden_linear(golden: &Golden, case: &str, kind: Kind, bias: bool, adapters: &[(&str, i64, f64)]) -> Linear {
        let weights = Weights::from_tensors(golden.under(&format!("{case}.weights.")), Device::Cpu, kind);
        let shape = weights.shape("weight").unwrap();
        let mut linear = Linear::load(&weights, shape[1], shape[0], bias).unwrap();
        weights.finish().unwrap();
        for (name, r, alpha) in adapters {
            let weights = Weights::from_tensors(golden.under(&format!("{case}.{name}.")), Device::Cpu, kind);
            linear.attach(name, &config(*r, Some(*alpha)), &weights).unwrap();
        }
        linear
    }

    /// A linear with adapters whose `B` is not zero.
    fn random_linear(in_features: i64, out_features: i64, rs: &[i64], kind: Kind) -> Linear {
        let weights = Weights::random(3, Device::Cpu, kind);
        let mut linear = Linear::load(&weights.pp("base"), in_features, out_features, true).unwrap();
        for (i, &r) in rs.iter().enumerate() {
            let alpha = (i % 2 == 1).then_some(1.5 * r as f64);
            linear.attach(&format!("adapter_{i}"), &config(r, alpha), &weights.pp(i)).unwrap();
        }
        let random = fixtures::Random::new(3);
        for adapter in linear.adapters() {
            let b = random.normal(adapter.lora_b().size()) * 0.2;
            tch::no_grad(|| adapter.lora_b().shallow_clone().copy_(&b));
        }
        linear
    }

    #[test]
    fn matches_reference() {
        let golden = fixtures::open("lora");
        let cases: [(&str, bool, &[_]); 2] =
            [("one", true, &[("only", 4, 8.0)]), ("two", false, &[("left", 2, 2.0), ("right", 3, 7.5)])];
        for (case, bias, adapters) in cases {
            let get = |name: &str| &golden[format!("{case}.{name}").as_str()];
            let mut linear = golden_linear(&golden, case, Kind::Float, bias, adapters);
            let x = get("x").copy().set_requires_grad(true);
            let y = linear.forward(&x);
            assert_close_to(&y, get("y"), 1e-5);
            (&y * get("y_grad")).sum(Kind::Float).backward();
            assert_close_to(&x.grad(), get("x_grad"), 1e-5);
            for adapter in linear.adapters() {
                let name = adapter.name();
                assert_close_to(&adapter.lora_a().grad(), get(&format!("{name}.lora_A.grad")), 1e-5);
                assert_close_to(&adapter.lora_b().grad(), get(&format!("{name}.lora_B.grad")), 1e-5);
                assert_close_to(&linear.delta_weight(name).unwrap(), get(&format!("{name}.delta")), 1e-6);
            }
            let before = linear.weight().copy();
            let first = linear.merge_adapter(adapters[0].0).unwrap();
            assert_close_to(&linear.weight(), get("merged_first"), 1e-6);
            linear.unmerge(first);
            assert_close_to(&linear.weight(), get("unmerged"), 1e-6);
            assert_close_to(&linear.weight(), &before, 1e-6);
            assert_close_to(&linear.forward(&x), get("y"), 1e-5);
            linear.merge();
            assert_close_to(&linear.weight(), get("merged"), 1e-6);
            assert_close_to(&linear.forward(&x), get("y"), 1e-5);
        }
    }

    /// A training step over bitsandbytes' weights, and what merging makes of them.
    #[test]
    fn a_weight_is_brought_into_few_bits_once() {
        let weights = Weights::random(4, Device::Cpu, Kind::Float);
        let mut linear = Linear::load(&weights.pp("q_proj"), 64, 8, false).unwrap();
        let x = fixtures::Random::new(1).normal([3, 64]);
        let before = linear.forward(&x);
        linear.quantize(Quantization::Int8Groups).unwrap();
        linear.quantize(Quantization::Int8Groups).unwrap();
        fixtures::assert_close_to(&linear.forward(&x), &before, 5e-3);
        let error = linear.quantize(Quantization::Int4Groups).unwrap_err().to_string();
        assert!(error.contains("in few bits already"), "{error}");
        let mut trained = Linear::load(&weights.pp("q_proj").trained(), 64, 8, false).unwrap();
        assert!(trained.quantize(Quantization::Int8Groups).unwrap_err().to_string().contains("trained"));

        // Stored and taken again they are the same bits; trained they cannot be, nor brought into others.
        let parts = linear.quantized().unwrap().stored().unwrap().unwrap();
        let stored = parts.map(|(part, tensor)| (format!("q_proj.weight{part}"), tensor));
        let source = Weights::from_tensors(stored, Device::Cpu, Kind::Float).pp("q_proj");
        let again = Linear::load(&source, 64, 8, false).unwrap();
        source.finish().unwrap();
        assert!(again.weight().equal(&linear.weight()));
        let told = |source: Weights| format!("{:#}", Linear::load(&source, 64, 8, false).unwrap_err());
        let said = told(source.trained());
        assert!(said.contains("q_proj.weight is in few bits: weights are trained whole"), "{said}");
        let said = told(source.quantized(Quantization::Nf4).unwrap());
        assert!(said.contains("q_proj.weight is in int8 already"), "{said}");
    }

    #[test]
    fn a_weight_in_few_bits_trains_as_the_reference_does() {
        let golden = fixtures::open("nf4");
        for (case, quantization) in [("nf4", Quantization::Nf4), ("int8", Quantization::Int8)] {
            let get = |name: &str| golden[&format!("{case}.{name}")].shallow_clone();
            let tensors = ["weight", "bias"].map(|name| (name.to_owned(), get(name)));
            let weights = Weights::from_tensors(tensors, Device::Cpu, Kind::Float).quantized(quantization).unwrap();
            let [out_features, in_features] = <[i64; 2]>::try_from(get("weight").size()).unwrap();
            let mut linear = Linear::load(&weights, in_features, out_features, true).unwrap();
            weights.finish().unwrap();
            let halves = ["lora_A", "lora_B"].map(|name| (format!("{name}.weight"), get(name)));
            let adapter = Weights::from_tensors(halves, Device::Cpu, Kind::Float);
            linear.attach("a", &config(3, Some(6.0)), &adapter).unwrap();

            let x = get("x").copy().set_requires_grad(true);
            let y = linear.forward(&x);
            assert_close_to(&y, &get("y"), 1e-5);
            let loss = y.square().mean(Kind::Float);
            assert_close_to(&loss, &get("loss"), 1e-5);
            loss.backward();
            assert_close_to(&x.grad(), &get("x.grad"), 1e-5);
            for (name, parameter) in adapter.parameters() {
                let half = name.trim_end_matches(".weight");
                assert_close_to(&parameter.grad(), &get(&format!("{half}.grad")), 1e-5);
            }
            assert_eq!(linear.quantized().map(QuantizedWeight::quantization), Some(quantization));
            assert_close_to(&linear.weight(), &get("dequantized"), 1e-7);
            // A place without adapters is that of the bits alone.
            let off = linear.forward_on(&x, &Active::Off);
            assert!(off.equal(&x.linear(&linear.weight(), Some(linear.bias().unwrap()))));
            linear.merge();
            assert!(linear.quantized().is_none());
            assert_close_to(&linear.forward(&x), &y, 1e-5);
        }
    }

    #[test]
    fn a_trained_weight_keeps_all_its_bits() {
        let weights = Weights::random(1, Device::Cpu, Kind::Float).quantized(Quantization::Nf4).unwrap();
        let linear = Linear::load(&weights.trained(), 16, 8, false).unwrap();
        assert!(linear.quantized().is_none() && linear.weight().requires_grad());
    }

    #[test]
    fn merging_in_bf16_rounds_once() {
        let golden = fixtures::open("lora");
        let mut linear = golden_linear(&golden, "bf16", Kind::BFloat16, false, &[("only", 4, 6.0)]);
        assert_close_to(&linear.delta_weight("only").unwrap(), &golden["bf16.only.delta"], 1e-6);
        linear.merge();
        assert_eq!(linear.weight().kind(), Kind::BFloat16);
        let unequal = linear.weight().not_equal_tensor(&golden["bf16.merged_first"]);
        let unequal = unequal.sum(Kind::Int64).int64_value(&[]);
        assert!(unequal <= 1, "{unequal} weights are rounded otherwise"); // the order of a sum in f32 may decide a tie
    }

    #[test]
    fn merged_is_forward_whatever_the_shape() {
        let random = fixtures::Random::new(7);
        for (in_features, out_features, rs) in
            [(1, 1, &[1][..]), (3, 17, &[2]), (32, 5, &[8, 3]), (7, 64, &[5, 1, 2]), (48, 48, &[64])]
        {
            let mut linear = random_linear(in_features, out_features, rs, Kind::Float);
            for shape in [vec![in_features], vec![4, in_features], vec![2, 3, in_features], vec![2, 1, 2, in_features]]
            {
                let x = random.normal(&*shape);
                let y = linear.forward(&x);
                assert_eq!(y.size()[..shape.len() - 1], shape[..shape.len() - 1]);
                assert_eq!(*y.size().last().unwrap(), out_features);
            }
            let x = random.normal([9, in_features]);
            let before = linear.forward(&x);
            linear.merge();
            assert_eq!(linear.adapters().count(), 0);
            assert_close_to(&linear.forward(&x), &before, 1e-4);
        }
    }

    #[test]
    fn only_a_and_b_are_trained_and_as_f32() {
        let linear = random_linear(16, 8, &[4], Kind::BFloat16);
        let x = fixtures::Random::new(1).normal([2, 3, 16]).to_kind(Kind::BFloat16);
        let y = linear.forward(&x);
        assert_eq!(y.kind(), Kind::BFloat16);
        y.sum(Kind::Float).backward();
        let adapter = linear.adapters().next().unwrap();
        for half in [adapter.lora_a(), adapter.lora_b()] {
            assert_eq!((half.kind(), half.grad().kind()), (Kind::Float, Kind::Float));
            assert!(half.grad().abs().sum(Kind::Float).double_value(&[]) > 0.0);
        }
        assert!(!linear.weight().requires_grad() && !linear.bias().unwrap().requires_grad());
        assert!(!linear.weight().grad().defined());
        assert_eq!(linear.num_adapter_parameters(), 4 * 16 + 8 * 4);
    }

    #[test]
    fn a_new_adapter_changes_nothing_and_a_detached_one_leaves_nothing() {
        let weights = Weights::random(5, Device::Cpu, Kind::Float);
        let mut linear = Linear::load(&weights, 16, 8, false).unwrap();
        let x = fixtures::Random::new(1).normal([3, 16]);
        let before = linear.forward(&x);
        linear.attach("sight", &config(4, None), &weights.pp("sight")).unwrap();
        assert!(linear.forward(&x).equal(&before));
        let a = linear.adapters().next().unwrap().lora_a().abs().max().double_value(&[]);
        assert!(a > 0.0 && a <= 0.25, "Kaiming-uniform: within 1 / sqrt(16), found {a}");
        let adapter = linear.detach("sight").unwrap();
        assert_eq!((adapter.name(), adapter.r(), adapter.scaling()), ("sight", 4, 1.0));
        assert_eq!(linear.adapters().count(), 0);
    }

    #[test]
    fn merging_never_writes_into_the_checkpoint() {
        let base = fixtures::Random::new(1).normal([8, 16]);
        let tensors = [("weight".to_owned(), base.shallow_clone())];
        let weights = Weights::from_tensors(tensors, Device::Cpu, Kind::Float);
        let mut linear = Linear::load(&weights, 16, 8, false).unwrap();
        let kept = base.copy();
        let new = Weights::random(1, Device::Cpu, Kind::Float);
        linear.attach("a", &config(2, None), &new).unwrap();
        let _ = tch::no_grad(|| linear.adapters().next().unwrap().lora_b().shallow_clone().fill_(1.0));
        linear.merge();
        assert!(base.equal(&kept) && !linear.weight().equal(&kept));
    }

    /// Of a linear whose own weight is trained, in f32 and under bf16 activations.
    #[test]
    fn a_trained_weight_stays_the_leaf_that_it_was() {
        let random = fixtures::Random::new(2);
        for (kind, tolerance) in [(Kind::Float, 1e-5), (Kind::BFloat16, 3e-2)] {
            let weights = Weights::random(2, Device::Cpu, kind).with_initializer_range(0.3);
            let mut linear = Linear::load(&weights.trained(), 16, 8, true).unwrap();
            linear.attach("a", &config(2, Some(3.0)), &weights.pp("a")).unwrap();
            let b = linear.adapters().next().unwrap().lora_b().shallow_clone();
            tch::no_grad(|| b.shallow_clone().copy_(&(random.normal(b.size()) * 0.3)));
            let names: Vec<String> = weights.parameters().into_iter().map(|(name, _)| name).collect();
            assert_eq!(names, ["weight", "bias", "a.lora_A.weight", "a.lora_B.weight"]);
            let x = random.normal([5, 16]).to_kind(kind);
            let y = linear.forward(&x);
            assert_eq!(y.kind(), kind);
            y.sum(Kind::Float).backward();
            let of_weight = x.to_kind(Kind::Float).sum_dim_intlist(0, false, Kind::Float).expand([8, 16], false);
            let parameters = weights.parameters();
            assert_close_to(&parameters[0].1.grad(), &of_weight, tolerance);
            assert_close_to(&parameters[1].1.grad(), &Tensor::full([8], 5.0, F32), 1e-6);

            let delta = linear.delta_weight("a").unwrap();
            assert!(!delta.requires_grad());
            let before = linear.weight().detach().copy();
            linear.merge();
            assert_close_to(&linear.weight(), &(&before + delta), 1e-6);
            assert_eq!(linear.weight().data_ptr(), parameters[0].1.data_ptr());
            assert!(linear.weight().is_leaf() && linear.weight().requires_grad());
            assert_close_to(&linear.forward(&x), &y, tolerance);
        }
    }

    /// Adapters, a DoRA and a bias that came with them: at the places given as on everything, elsewhere as without them.
    #[test]
    fn adapters_act_where_they_are_told_to() {
        let random = fixtures::Random::new(11);
        let dora = || {
            let magnitude = random.normal([6]).abs() + 0.5;
            let tensors = [
                ("lora_A.weight".to_owned(), random.normal([2, 4])),
                ("lora_B.weight".to_owned(), random.normal([6, 2])),
                ("lora_magnitude_vector".to_owned(), magnitude),
            ];
            let weights = Weights::random(3, Device::Cpu, Kind::Float);
            let mut linear = Linear::load(&weights, 4, 6, true).unwrap();
            let dora = Weights::from_tensors(tensors, Device::Cpu, Kind::Float);
            linear.attach("dora", &config(2, None), &dora).unwrap();
            linear
        };
        let biased = || {
            let weights = Weights::random(4, Device::Cpu, Kind::Float);
            let mut linear = Linear::load(&weights, 4, 6, false).unwrap();
            linear.attach("a", &config(2, None), &weights.pp("a")).unwrap();
            linear.set_bias(random.normal([6]));
            linear
        };
        for mut linear in [random_linear(4, 6, &[2, 1], Kind::Float), dora(), biased()] {
            let x = random.normal([2, 3, 4]).set_requires_grad(true);
            let everywhere = linear.forward(&x);
            let off = linear.forward_on(&x, &Active::Off);
            let found = linear.forward_on(&x, &Active::At(Tensor::from_slice(&[1i64, 2, 5])));
            assert_eq!(found.size(), [2, 3, 6]);
            let (found, everywhere, off) = (found.flatten(0, 1), everywhere.flatten(0, 1), off.flatten(0, 1));
            for place in 0..6 {
                if [1, 2, 5].contains(&place) {
                    assert_close_to(&found.get(place), &everywhere.get(place), 1e-6);
                    assert!(!everywhere.get(place).allclose(&off.get(place), 1e-3, 1e-3, false));
                } else {
                    assert!(found.get(place).equal(&off.get(place)));
                }
            }
            // The gradient is that of the rows picked from both.
            let picked = [off.get(0), everywhere.get(1), everywhere.get(2), off.get(3), off.get(4), everywhere.get(5)];
            let grad = random.normal([6, 6]);
            let gradients = |y: &Tensor, linear: &Linear| {
                (y * &grad).sum(Kind::Float).backward();
                let halves = linear.adapters().flat_map(|a| [a.lora_a(), a.lora_b()]);
                let all: Vec<Tensor> = halves.chain([&x]).map(|t| t.grad().copy()).collect();
                for tensor in linear.adapters().flat_map(|a| [a.lora_a(), a.lora_b()]).chain([&x]) {
                    tensor.shallow_clone().zero_grad();
                }
                all
            };
            let expected = gradients(&Tensor::stack(&picked, 0), &linear);
            for (found, expected) in gradients(&found, &linear).iter().zip(&expected) {
                assert_close_to(found, expected, 1e-5);
            }
            // Without its adapters the layer is what `Off` was, but for a bias of its own.
            linear.adapters.clear();
            if !linear.adapters_bias {
                assert!(linear.forward(&x).flatten(0, 1).equal(&off));
            }
        }
    }

    #[test]
    fn errors_name_the_adapter() {
        let mut linear = random_linear(4, 4, &[1, 1], Kind::Float);
        let expected = r#"no adapter `sight` is attached; there are ["adapter_0", "adapter_1"]"#;
        assert_eq!(linear.detach("sight").unwrap_err().to_string(), expected);
        assert_eq!(linear.merge_adapter("sight").unwrap_err().to_string(), expected);
        assert_eq!(linear.delta_weight("sight").unwrap_err().to_string(), expected);
        let error = linear
            .attach("adapter_1", &config(1, None), &Weights::random(0, Device::Cpu, Kind::Float).pp("layers.0"))
            .unwrap_err();
        assert_eq!(error.to_string(), "layers.0 already carries an adapter `adapter_1`");
    }
}

//! Parameter groups: another rule, or another learning rate, for some of the parameters.

use std::fmt;
use std::ops::Range;

use super::{PlaceError, RuleState, RuleStateError, Scalar, UpdateRule};
use crate::ids::Version;
use crate::weights::Layout;

/// Makes a rule for a part of the weights.
type Make = Box<dyn Fn() -> Box<dyn UpdateRule> + Send>;

/// Says of the path of a parameter whether it is a member.
type IsMember = Box<dyn Fn(&str) -> bool + Send>;

/// An update rule that treats groups of parameters differently.
///
/// There is a rule for all parameters, and others for groups. Learning rates of groups are factors of the rate of the
/// update, so they follow a schedule. If a parameter is in several groups, the last one that was added counts, for rule
/// and rate separately.
///
/// ```
/// use ps_actors::rule::{Groups, Sgd};
/// use ps_actors::server::{ApplyGradients, ParameterServer, ServerConfig};
/// use ps_actors::weights::{Layout, Parameter, Weights};
/// # use ps_actors::ids::{Clock, GradientId, Incarnation, Version, WorkerId};
/// # use ps_actors::weights::{Gradient, GradientUpdate};
///
/// let weight = Parameter { name: "weight".into(), shape: vec![2], range: 0..2 };
/// let bias = Parameter { name: "bias".into(), shape: vec![1], range: 2..3 };
/// let initial = Weights::initial(Layout::new(vec![weight, bias])?, vec![0.0; 3]);
///
/// let rule = Groups::new(Sgd::new).with_rate(|name| name == "bias", 0.5);
/// let config = ServerConfig { learning_rate: 1.0, ..ServerConfig::default() };
/// let server = ParameterServer::new(&initial, rule, config)?.spawn()?;
/// # let id = GradientId { worker: WorkerId(0), incarnation: Incarnation(1), clock: Clock(0) };
/// # let gradient = Gradient::new(vec![1.0; 3]);
/// # let update =
/// #     GradientUpdate { id, computed_on: Version(0), loss: 0.0, num_examples: 1, gradient };
/// // `update` is a worker's gradient: [1.0, 1.0, 1.0].
/// let weights = server.ask(ApplyGradients::mean([update])).wait()??;
/// assert_eq!(weights.to_vec(), [-1.0, -1.0, -0.5]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// If the numbers of a group are not contiguous, each contiguous run has a rule of its own, and all of these rules make
/// the same updates. So the result does not depend on where servers cut the weights.
pub struct Groups {
    /// The rule of all parameters, then those of the groups.
    rules: Vec<Make>,
    members: Vec<(IsMember, Role)>,
    parts: Vec<Part>,
    /// For each rule one that has a single weight, which is always 0. It says what state the rule keeps, also on a
    /// server without a parameter of the group.
    samples: Vec<Box<dyn UpdateRule>>,
}

/// What is different for the members of a group.
enum Role {
    /// The index of the rule.
    Rule(usize),
    /// The factor of the learning rate.
    Rate(f64),
}

/// Weights that follow one another and are treated alike.
struct Part {
    range: Range<usize>,
    index: usize,
    factor: f64,
    rule: Box<dyn UpdateRule>,
}

impl Groups {
    /// Uses the rules that `make` makes for all parameters. A schedule goes around the groups:
    /// `Scheduled::new(Groups::new(…), schedule)`. One inside of a group has no effect.
    #[must_use]
    pub fn new<R: UpdateRule>(make: impl Fn() -> R + Send + 'static) -> Self {
        Self {
            rules: vec![boxed(make)],
            members: Vec::new(),
            parts: Vec::new(),
            samples: Vec::new(),
        }
    }

    /// Uses the rules that `make` makes for the parameters whose path `is_member` accepts.
    #[must_use]
    pub fn with_rule<R: UpdateRule>(
        mut self,
        is_member: impl Fn(&str) -> bool + Send + 'static,
        make: impl Fn() -> R + Send + 'static,
    ) -> Self {
        let role = Role::Rule(self.rules.len());
        self.rules.push(boxed(make));
        self.members.push((Box::new(is_member), role));
        self
    }

    /// Multiplies the learning rate of the parameters whose path `is_member` accepts.
    ///
    /// # Panics
    /// If `factor` is negative or not finite.
    #[must_use]
    pub fn with_rate(
        mut self,
        is_member: impl Fn(&str) -> bool + Send + 'static,
        factor: f64,
    ) -> Self {
        assert!(
            factor.is_finite() && factor >= 0.0,
            "{factor} is no factor of a learning rate: it must be finite and at least 0"
        );
        self.members.push((Box::new(is_member), Role::Rate(factor)));
        self
    }

    /// Returns the index of the rule of a parameter, and the factor of its learning rate.
    fn role(&self, name: &str) -> (usize, f64) {
        let mut found = (0, 1.0);
        for (is_member, role) in &self.members {
            match role {
                Role::Rule(index) if is_member(name) => found.0 = *index,
                Role::Rate(factor) if is_member(name) => found.1 = *factor,
                Role::Rule(_) | Role::Rate(_) => {}
            }
        }
        found
    }

    /// Makes one part of all weights, for a rule that was not told which parameters they belong to.
    fn place_if_needed(&mut self, num_weights: usize) {
        if self.samples.is_empty() {
            self.samples = self.rules.iter().map(|make| make()).collect();
            let (index, factor) = self.role("");
            self.parts = vec![Part {
                range: 0..num_weights,
                index,
                factor,
                rule: (self.rules[index])(),
            }];
        }
    }

    fn foreign(&self, problem: impl Into<String>) -> RuleStateError {
        RuleStateError {
            rule: format!("{self:?}"),
            problem: problem.into(),
        }
    }
}

fn boxed<R: UpdateRule>(make: impl Fn() -> R + Send + 'static) -> Make {
    Box::new(move || Box::new(make()))
}

impl UpdateRule for Groups {
    fn place(&mut self, layout: &Layout, range: Range<usize>) -> Result<(), PlaceError> {
        self.samples = self.rules.iter().map(|make| make()).collect();
        self.parts.clear();
        for parameter in layout.parameters() {
            let own = parameter.range.start.max(range.start)..parameter.range.end.min(range.end);
            if own.is_empty() {
                continue;
            }
            let own = own.start - range.start..own.end - range.start;
            let (index, factor) = self.role(&parameter.name);
            match self.parts.last_mut() {
                Some(last) if (last.index, last.factor) == (index, factor) => {
                    last.range.end = own.end;
                }
                _ => self.parts.push(Part {
                    range: own,
                    index,
                    factor,
                    rule: (self.rules[index])(),
                }),
            }
        }
        for part in &mut self.parts {
            let own = range.start + part.range.start..range.start + part.range.end;
            part.rule.place(layout, own)?;
        }
        Ok(())
    }

    fn update(&mut self, weights: &mut [f32], gradient: &[f32], learning_rate: f64) {
        self.place_if_needed(weights.len());
        for part in &mut self.parts {
            let (range, rate) = (part.range.clone(), learning_rate * part.factor);
            let (weights, gradient) = (&mut weights[range.clone()], &gradient[range]);
            part.rule.update(weights, gradient, rate);
        }
        for sample in &mut self.samples {
            sample.update(&mut [0.0], &[0.0], learning_rate);
        }
    }

    fn update_into(
        &mut self,
        weights: &[f32],
        gradient: &[f32],
        learning_rate: f64,
        next: &mut [f32],
    ) {
        self.place_if_needed(weights.len());
        for part in &mut self.parts {
            let (range, rate) = (part.range.clone(), learning_rate * part.factor);
            let (weights, gradient) = (&weights[range.clone()], &gradient[range.clone()]);
            part.rule
                .update_into(weights, gradient, rate, &mut next[range]);
        }
        for sample in &mut self.samples {
            sample.update(&mut [0.0], &[0.0], learning_rate);
        }
    }

    fn learning_rate(&mut self, _: Version, set: f64) -> f64 {
        set
    }

    fn save(&self) -> RuleState {
        let mut all = RuleState::default();
        let num_weights = self.parts.last().map_or(0, |part| part.range.end);
        for (index, sample) in self.samples.iter().enumerate() {
            let RuleState { vectors, scalars } = sample.save();
            for (name, _) in &vectors {
                let has = (format!("{index}/has {name}"), Scalar::Bool(true));
                all.scalars.push(has);
                if all.vectors.iter().all(|(known, _)| known != name) {
                    all.vectors.push((name.clone(), vec![0.0; num_weights]));
                }
            }
            let named = |(name, value)| (format!("{index}/{name}"), value);
            all.scalars.extend(scalars.into_iter().map(named));
        }
        for part in &self.parts {
            for (name, numbers) in part.rule.save().vectors {
                let found = all.vectors.iter_mut().find(|(known, _)| *known == name);
                // All rules of a group have made the same updates, so they keep the same vectors.
                if let Some((_, all)) = found {
                    all[part.range.clone()].copy_from_slice(&numbers);
                }
            }
        }
        all
    }

    fn restore(&mut self, state: RuleState) -> Result<(), RuleStateError> {
        let RuleState { vectors, scalars } = state;
        let len = vectors.first().map_or(0, |(_, numbers)| numbers.len());
        if vectors.iter().any(|(_, numbers)| numbers.len() != len) {
            return Err(self.foreign("its vectors have different lengths"));
        }
        self.place_if_needed(len);
        // The names of the vectors, and the numbers, of each rule.
        let mut of = vec![(Vec::new(), Vec::new()); self.rules.len()];
        for (name, value) in scalars {
            let split = name.split_once('/');
            let split = split.and_then(|(index, name)| Some((index.parse::<usize>().ok()?, name)));
            let Some((index, name)) = split.filter(|(index, _)| *index < of.len()) else {
                return Err(self.foreign(format!("it has no group for the number `{name}`")));
            };
            match name.strip_prefix("has ") {
                Some(vector) => of[index].0.push(vector.to_owned()),
                None => of[index].1.push((name.to_owned(), value)),
            }
        }
        let is_known = |name: &String| of.iter().any(|(names, _)| names.contains(name));
        if let Some((name, _)) = vectors.iter().find(|(name, _)| !is_known(name)) {
            return Err(self.foreign(format!("none of its groups has the vector `{name}`")));
        }
        let part_of = |index: usize, range: Option<Range<usize>>| {
            let (names, scalars): &(Vec<String>, Vec<_>) = &of[index];
            let named = vectors.iter().filter(|(name, _)| names.contains(name));
            let cut = |numbers: &Vec<f32>| match &range {
                Some(range) => numbers.get(range.clone()).unwrap_or_default().to_vec(),
                None => vec![0.0],
            };
            RuleState {
                vectors: named
                    .map(|(name, numbers)| (name.clone(), cut(numbers)))
                    .collect(),
                scalars: scalars.clone(),
            }
        };
        for part in &mut self.parts {
            let own = part_of(part.index, Some(part.range.clone()));
            part.rule.restore(own)?;
        }
        for (index, sample) in self.samples.iter_mut().enumerate() {
            sample.restore(part_of(index, None))?;
        }
        Ok(())
    }
}

impl fmt::Debug for Groups {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rules = self.rules.iter().map(|make| make());
        let rates = self.members.iter().filter_map(|(_, role)| match role {
            Role::Rate(factor) => Some(factor),
            Role::Rule(_) => None,
        });
        f.debug_struct("Groups")
            .field("rules", &rules.collect::<Vec<_>>())
            .field("rates", &rates.collect::<Vec<_>>())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rule::Sgd;
    use crate::weights::Parameter;

    const LEN: usize = 12;

    fn layout() -> Layout {
        let named = |(name, range): (&str, Range<usize>)| Parameter {
            name: name.to_owned(),
            shape: vec![range.len()],
            range,
        };
        let parameters = [
            ("a.weight", 0..5),
            ("a.bias", 5..7),
            ("b.weight", 7..10),
            ("b.bias", 10..12),
        ];
        Layout::new(parameters.map(named).into()).unwrap()
    }

    /// Momentum for the biases, at half the rate; plain SGD for the weights.
    fn groups() -> Groups {
        Groups::new(Sgd::new)
            .with_rule(|name| name.ends_with("bias"), || Sgd::with_momentum(0.5))
            .with_rate(|name| name.ends_with("bias"), 0.5)
    }

    fn gradient(step: usize) -> Vec<f32> {
        (0..LEN)
            .map(|i| ((i * 7 + step * 5) % 11) as f32 - 5.0)
            .collect()
    }

    /// What the rules do, one parameter after the other.
    fn expected(num_steps: usize) -> Vec<f32> {
        let mut weights = vec![1.0; LEN];
        let layout = layout();
        for parameter in layout.parameters() {
            let (mut rule, rate) = match parameter.name.ends_with("bias") {
                true => (Sgd::with_momentum(0.5), 0.05),
                false => (Sgd::new(), 0.1),
            };
            for step in 0..num_steps {
                let range = parameter.range.clone();
                rule.update(&mut weights[range.clone()], &gradient(step)[range], rate);
            }
        }
        weights
    }

    #[test]
    fn each_parameter_has_the_rule_and_the_rate_of_its_group_wherever_servers_cut() {
        for cuts in [vec![], vec![6], vec![3, 6, 11], vec![5, 7, 10]] {
            let ends = cuts.iter().copied().chain([LEN]);
            let starts = [0].into_iter().chain(cuts.iter().copied());
            let mut weights = vec![1.0; LEN];
            for range in starts.zip(ends).map(|(start, end)| start..end) {
                let mut rule = groups();
                rule.place(&layout(), range.clone()).unwrap();
                for step in 0..4 {
                    let (old, gradient) = (weights[range.clone()].to_vec(), gradient(step));
                    let (gradient, next) = (&gradient[range.clone()], &mut weights[range.clone()]);
                    match step % 2 {
                        0 => rule.update(next, gradient, 0.1),
                        _ => rule.update_into(&old, gradient, 0.1, next),
                    }
                }
            }
            assert_eq!(weights, expected(4), "{cuts:?}");
        }
    }

    /// A checkpoint of two servers, one of which has no bias, and three servers that go on.
    #[test]
    fn a_saved_state_goes_on_however_it_is_cut() {
        let mut weights = vec![1.0; LEN];
        let states = [0..5, 5..LEN].map(|range| {
            let mut rule = groups();
            rule.place(&layout(), range.clone()).unwrap();
            for step in 0..2 {
                rule.update(
                    &mut weights[range.clone()],
                    &gradient(step)[range.clone()],
                    0.1,
                );
            }
            rule.save()
        });
        assert_eq!(states[0].scalars, states[1].scalars);
        let names = |state: &RuleState| {
            state
                .vectors
                .iter()
                .map(|v| v.0.clone())
                .collect::<Vec<_>>()
        };
        assert_eq!(names(&states[0]), names(&states[1]));
        let joined = |at: usize| {
            let vectors = states.iter().map(|state| &state.vectors[at].1[..]);
            vectors.collect::<Vec<_>>().concat()
        };
        for range in [0..6, 6..8, 8..LEN] {
            let mut rule = groups();
            rule.place(&layout(), range.clone()).unwrap();
            let vectors = names(&states[0]).into_iter().enumerate();
            let vectors = vectors.map(|(at, name)| (name, joined(at)[range.clone()].to_vec()));
            let scalars = states[0].scalars.clone();
            let state = RuleState {
                vectors: vectors.collect(),
                scalars,
            };
            rule.restore(state.clone()).unwrap();
            assert_eq!(rule.save(), state);
            for step in 2..4 {
                rule.update(
                    &mut weights[range.clone()],
                    &gradient(step)[range.clone()],
                    0.1,
                );
            }
        }
        assert_eq!(weights, expected(4));
    }

    #[test]
    fn a_foreign_state_is_refused() {
        let state = |vectors: &[(&str, usize)], scalars: &[&str]| RuleState {
            vectors: vectors
                .iter()
                .map(|(name, len)| ((*name).to_owned(), vec![0.0; *len]))
                .collect(),
            scalars: scalars
                .iter()
                .map(|name| ((*name).to_owned(), Scalar::Bool(true)))
                .collect(),
        };
        for (state, expected) in [
            (
                state(&[("velocity", LEN)], &[]),
                "none of its groups has the vector `velocity`",
            ),
            (state(&[], &["time"]), "no group for the number `time`"),
            (state(&[], &["2/time"]), "no group for the number `2/time`"),
            (state(&[], &["0/time"]), "it keeps only a vector"),
            (
                state(&[("velocity", LEN)], &["0/has velocity"]),
                "it keeps only a vector",
            ),
            (
                state(&[("a", LEN), ("b", 3)], &["1/has a", "1/has b"]),
                "different lengths",
            ),
        ] {
            let mut rule = groups();
            rule.place(&layout(), 0..LEN).unwrap();
            let error = rule.restore(state).unwrap_err();
            assert!(error.to_string().contains(expected), "{expected}: {error}");
        }
        let mut rule = groups();
        rule.place(&layout(), 0..LEN).unwrap();
        rule.restore(RuleState::default()).unwrap();
    }
}

//! The loss of a classifier, and the number of its right answers.

use burn::tensor::{Int, Tensor};

use crate::panic;

/// Returns the mean negative log likelihood of the targets, a tensor of one number.
///
/// `log_probabilities: [batch, classes]`, as from log-softmax; `targets: [batch]`, each in
/// `0..classes`. Formula: <https://docs.pytorch.org/docs/stable/generated/torch.nn.NLLLoss.html>
/// with `reduction='mean'` and no weights.
///
/// ```
/// use ps_model::burn::tensor::{Tensor, activation::log_softmax};
/// use ps_model::{default_device_name, nll_loss, num_correct, select_device};
///
/// let device = select_device(default_device_name())?;
/// // Two examples and three classes. The second answer is wrong.
/// let scores = Tensor::<2>::from_data([[9.0, 0.0, 0.0], [9.0, 0.0, 0.0]], &device);
/// let targets = Tensor::from_data([0, 2], &device);
/// let log_probabilities = log_softmax(scores, 1);
/// assert_eq!(num_correct(log_probabilities.clone(), targets.clone()), 1);
/// let loss: f32 = nll_loss(log_probabilities, targets).into_scalar();
/// assert!((loss - 4.5).abs() < 0.01, "{loss}"); // The mean of almost 0 and almost 9.
/// # Ok::<(), ps_model::DeviceError>(())
/// ```
///
/// # Panics
///
/// If the batch sizes differ. A target out of range panics on the CPU and gives a wrong number on most
/// GPUs; [`ImageBatch`](crate::ImageBatch) checks its labels.
#[must_use]
pub fn nll_loss(log_probabilities: Tensor<2>, targets: Tensor<1, Int>) -> Tensor<1> {
    let [batch, classes] = log_probabilities.dims();
    let [num_targets] = targets.dims();
    assert_eq!(batch, num_targets, "one target for each row");
    let indices = targets.clone().unsqueeze_dim::<2>(1);
    // Labels are checked only after burn has failed. To check them in each step, a GPU would have to wait
    // for the copy.
    match panic::catch(|| log_probabilities.gather(1, indices)) {
        Ok(of_targets) => of_targets.mean().neg(),
        Err(message) => panic!("{}", wrong_target(targets, classes).unwrap_or(message)),
    }
}

/// Returns a text that says which target is not one of the classes.
fn wrong_target(targets: Tensor<1, Int>, classes: usize) -> Option<String> {
    let targets = targets.into_data();
    let wrong = |(_, label): &(usize, i64)| !(0..classes as i64).contains(label);
    let (example, label) = targets.iter::<i64>().enumerate().find(wrong)?;
    Some(format!(
        "label {label} of example {example} is not in 0..{classes}"
    ))
}

/// Counts the rows whose largest log probability is that of the target.
///
/// Shapes as for [`nll_loss`].
///
/// # Panics
///
/// If the batch sizes differ.
#[must_use]
pub fn num_correct(log_probabilities: Tensor<2>, targets: Tensor<1, Int>) -> usize {
    let [batch, _classes] = log_probabilities.dims();
    let [num_targets] = targets.dims();
    assert_eq!(batch, num_targets, "one target for each row");
    let predicted: Tensor<1, Int> = log_probabilities.argmax(1).squeeze_dim(1);
    let correct = predicted.equal(targets).int().sum().into_scalar::<i64>();
    usize::try_from(correct).expect("a count of rows is not negative")
}

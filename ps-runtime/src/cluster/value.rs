//! Values that live in one process and are used from all processes, through handles. PyTorch calls such a
//! handle an RRef.
//!
//! Each value is held by a small actor of its own. So a handle guarantees what an [`ActorRef`] guarantees:
//! methods run one after another in the process of the value, the value is dropped with its last handle,
//! and the handles of a lost process stop counting. Each value takes a thread, like every actor. A result
//! that is fetched only once should be [kept](crate::remote::Kept) instead.

use std::fmt;
use std::marker::PhantomData;

use actix::{Actor, Context, Handler, Message, MessageResult};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::{Cluster, Hosted, NodeId, SpawnOn, SpawnOnError, Task};
use crate::actor::{ActorRef, Reply, RestartPolicy, Spawn, SpawnError};
use crate::remote::{Messages, Remote};

/// A type whose values other processes can use through a [`RemoteRef`].
///
/// ```
/// use actix::Message;
/// use ps_runtime::cluster::{Method, Owned, RemoteRef, Value};
/// use ps_runtime::remote::Messages;
/// use serde::{Deserialize, Serialize};
///
/// #[derive(Clone, Serialize, Deserialize)]
/// struct Mean {
///     sum: f64,
///     count: u32,
/// }
///
/// #[derive(Message, Serialize, Deserialize)]
/// #[rtype(result = "f64")]
/// struct Add(f64);
///
/// impl Method<Mean> for Add {
///     fn call(self, mean: &mut Mean) -> f64 {
///         mean.sum += self.0;
///         mean.count += 1;
///         mean.sum / f64::from(mean.count)
///     }
/// }
///
/// impl Value for Mean {
///     fn methods(methods: &mut Messages<Owned<Self>>) {
///         methods.add::<Add>();
///     }
/// }
///
/// let mean = RemoteRef::new(Mean { sum: 0.0, count: 0 })?;
/// mean.call(Add(1.0)).wait()?;
/// assert_eq!(mean.call(Add(2.0)).wait()?, 1.5);
/// assert_eq!(mean.fetch().wait()?.count, 2);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub trait Value: Clone + Serialize + DeserializeOwned + Send + 'static {
    /// Adds each [`Method`] that may be called from another process. The order of the methods is part of
    /// the protocol.
    fn methods(methods: &mut Messages<Owned<Self>>) {
        let _ = methods;
    }
}

/// A message that runs on a value, in the process of the value.
pub trait Method<T>: Message {
    /// Runs the method. Meanwhile other calls to the same value wait.
    fn call(self, value: &mut T) -> Self::Result;
}

/// The actor that holds a value.
pub struct Owned<T> {
    /// In a box, because actors must be `Unpin` and values need not be.
    value: Box<T>,
}

impl<T> Owned<T> {
    pub(crate) fn new(value: T) -> Self {
        Self {
            value: Box::new(value),
        }
    }

    /// Allows no restart: it would silently go back to the first value. Methods are not asynchronous, so
    /// values need no sockets on their threads.
    pub(crate) fn options() -> Spawn {
        Spawn::new()
            .thread_name("value")
            .restart(RestartPolicy::NEVER)
            .without_io()
    }
}

impl<T> fmt::Debug for Owned<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Owned<{}>", std::any::type_name::<T>())
    }
}

impl<T: Value> Actor for Owned<T> {
    type Context = Context<Self>;
}

impl<T: Value, M: Method<T> + 'static> Handler<M> for Owned<T> {
    type Result = MessageResult<M>;

    fn handle(&mut self, method: M, _: &mut Context<Self>) -> Self::Result {
        MessageResult(method.call(&mut self.value))
    }
}

impl<T: Value> Remote for Owned<T> {
    fn messages(messages: &mut Messages<Self>) {
        messages.add::<Fetch<T>>();
        T::methods(messages);
    }
}

impl<T: Value> Hosted for Owned<T> {
    type Args = T;
}

/// Copies the value.
#[derive(Serialize, Deserialize)]
#[serde(bound = "")]
pub(crate) struct Fetch<T>(pub(crate) PhantomData<fn() -> T>);

impl<T: 'static> Message for Fetch<T> {
    type Result = T;
}

impl<T: Clone + 'static> Method<T> for Fetch<T> {
    fn call(self, value: &mut T) -> T {
        value.clone()
    }
}

/// A handle to a value that lives in one process of a cluster. It is cheap to clone, and can be sent
/// inside messages and replies.
///
/// The value is dropped with its last handle: at once if that handle is in the value's own process, else
/// after a grace period, as with an [`ActorRef`]. If a method panics, the value is dropped, too, because
/// its state is unknown then.
///
/// ```
/// use ps_runtime::cluster::{Cluster, Hosts, RemoteRef, SpawnOn, Value};
/// use serde::{Deserialize, Serialize};
///
/// #[derive(Clone, Serialize, Deserialize)]
/// struct Vocabulary(Vec<String>);
///
/// impl Value for Vocabulary {}
///
/// // The cluster chooses the process that gets the value. Here it is this one.
/// let cluster = Cluster::alone(Hosts::new().values::<Vocabulary>());
/// let words = Vocabulary(vec!["one".to_owned(), "two".to_owned()]);
/// let handle = RemoteRef::new_on(&cluster, SpawnOn::new(), words).wait()?;
/// assert_eq!(handle.fetch().wait()?.0.len(), 2);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// [`Value`] has an example with methods.
#[derive(Serialize, Deserialize)]
#[serde(bound = "")]
pub struct RemoteRef<T: Value> {
    actor: ActorRef<Owned<T>>,
}

impl<T: Value> RemoteRef<T> {
    /// Starts an actor in this process that holds the value.
    ///
    /// # Errors
    /// When the system gives no thread.
    #[allow(clippy::missing_panics_doc, reason = "it is started once")]
    pub fn new(value: T) -> Result<Self, SpawnError> {
        let mut value = Some(value);
        let actor = Owned::<T>::options().start(move || {
            let value = value
                .take()
                .expect("an actor without restarts is started once");
            Owned::new(value)
        })?;
        Ok(Self { actor })
    }

    /// Sends a value to a process of a cluster, which holds it from then on. That process must
    /// [host values](crate::cluster::Hosts::values) of this type.
    pub fn new_on(
        cluster: &Cluster,
        options: SpawnOn,
        value: T,
    ) -> Task<Result<Self, SpawnOnError>> {
        let started = cluster.spawn_with(options, value);
        let handle = async move { started.await.map(|actor| Self { actor }) };
        Task::try_start(handle, |error| Err(SpawnOnError::Threads(error)))
    }

    /// The process that has the value, or `None` if it is this process.
    #[must_use]
    pub fn owner(&self) -> Option<NodeId> {
        self.actor.node()
    }

    /// Copies the value to this process.
    pub fn fetch(&self) -> Reply<T> {
        self.actor.ask(Fetch(PhantomData))
    }

    /// Calls a method in the process of the value.
    pub fn call<M>(&self, method: M) -> Reply<M::Result>
    where
        M: Method<T> + Send + 'static,
        M::Result: Send,
    {
        self.actor.ask(method)
    }
}

impl<T: Value> Clone for RemoteRef<T> {
    fn clone(&self) -> Self {
        let actor = self.actor.clone();
        Self { actor }
    }
}

impl<T: Value> fmt::Debug for RemoteRef<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, value) = (self.actor.name(), std::any::type_name::<T>());
        write!(f, "RemoteRef<{value}>({name})")
    }
}

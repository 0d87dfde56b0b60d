"""CharLSTM: a recurrent model of text, byte by byte (Graves, 2013; Karpathy's char-rnn)."""

from dataclasses import dataclass

from torch import nn

from genkern.models._base import Model, Training
from genkern.models.autoregressive._tokens import Tokens, check_text


@dataclass
class CharLSTMConfig:
    vocabulary: int = 256
    width: int = 256
    layers: int = 1
    dropout: float = 0.0


class CharLSTM(Tokens, Model):
    """CharLSTM(CharLSTMConfig()): embedding, torch.nn.LSTM, linear; sequences (N, T) of any length, figures in nats."""

    Config = CharLSTMConfig
    defaults = Training(epochs=10, batch_size=32, learning_rate=4e-3, schedule="cosine", clip_grad_norm=5.0)

    @classmethod
    def config_for(cls, data, **settings):
        check_text(cls.__name__, data)
        return cls.Config(**settings)

    def __init__(self, config):
        super().__init__(config)
        c = config
        self.embedding = nn.Embedding(c.vocabulary + 1, c.width)  # the last one is the start symbol
        self.lstm = nn.LSTM(c.width, c.width, c.layers, batch_first=True, dropout=c.dropout)
        self.head = nn.Linear(c.width, c.vocabulary)

    def _run(self, tokens, state):
        x, state = self.lstm(self.embedding(self._inputs(tokens, state)), state)
        return self.head(x), state

"""A method whose term reads activations."""

from toy_methods import mortal


class Activity(mortal.Mortal):
    """Small activations behind the first convolution of every block."""

    name = "toy_activity"
    title = "Activity"
    picks = "after"

    def prepare(self, model, context):
        super().prepare(model, context)
        self._seen = []
        if context.stage == "regularize":
            for name, module in model.named_modules():
                if name.endswith("conv1"):
                    module.register_forward_hook(self._keep)

    def _keep(self, module, inputs, output):
        if module.training:
            self._seen.append(output)

    def batch_terms(self, batch, outputs):
        if not self._seen:
            return {}
        term = sum(seen.square().mean() for seen in self._seen)
        self._seen.clear()
        return {"activity": 0.1 * term}
